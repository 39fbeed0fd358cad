//! `cargo xtask bench wire` leaves nothing behind.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, Command, Stdio},
};

use canary_tests::{binary, host, spawn, sweep::NETNS_FOLDER};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::support::alone;

/// The benchmark with what it says on its way.
struct Run {
    child: Child,
    errors: BufReader<std::process::ChildStderr>,
}

impl Run {
    fn start(args: &[&str]) -> Self {
        let mut command = Command::new(binary::locate("bench"));
        command.arg("wire").args(args).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = spawn::spawn(command).expect("starting the benchmark");
        let errors = BufReader::new(child.stderr.take().expect("its errors"));
        Self { child, errors }
    }

    /// The next line on standard error, or nothing at its end.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.errors.read_line(&mut line).expect("its errors");
        line
    }

    /// How it ended, and what it complained of.
    fn end(mut self) -> (Option<i32>, String) {
        let mut errors = String::new();
        self.errors.read_to_string(&mut errors).expect("its errors");
        let status = self.child.wait().expect("its end");
        (status.code(), errors)
    }
}

/// Namespaces and folders of a process.
fn left_by(pid: u32) -> Vec<String> {
    let folders = [NETNS_FOLDER.into(), std::env::temp_dir()];
    let entries = folders.iter().flat_map(fs::read_dir).flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(&format!("canary-{pid}-"))).collect()
}

#[test]
fn bench_wire_that_is_interrupted_leaves_nothing_behind() {
    if !host::ready("bench_wire_that_is_interrupted_leaves_nothing_behind") {
        return;
    }
    let _alone = alone();
    let mut run = Run::start(&["--rounds", "1", "--seconds", "60"]);
    let pid = run.child.id();
    // It would go on for half an hour.
    let mut line = run.line();
    while !line.starts_with("round 1") {
        assert!(!line.is_empty(), "it has ended");
        line = run.line();
    }
    assert_ne!(left_by(pid), Vec::<String>::new());
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGINT).expect("a signal");
    let (code, errors) = run.end();
    assert_eq!(code, Some(130), "{errors}");
    assert!(errors.contains("interrupted"), "{errors}");
    assert_eq!(left_by(pid), Vec::<String>::new());
}
