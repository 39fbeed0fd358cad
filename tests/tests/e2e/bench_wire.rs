//! `cargo xtask bench wire` measures what it says, and leaves nothing behind.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, Command, Stdio},
};

use canary_tests::{binary, host, spawn, sweep::NETNS_FOLDER};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::support::alone;

/// The benchmark with what it says on its way.
struct Run {
    child: Child,
    errors: BufReader<std::process::ChildStderr>,
}

impl Run {
    fn start(args: &[&str]) -> Self {
        let mut command = Command::new(binary::locate("bench"));
        command.arg("wire").args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
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

    /// How it ended, what it printed, and what it complained of.
    fn end(mut self) -> (Option<i32>, String, String) {
        let (mut out, mut errors) = (String::new(), String::new());
        self.errors.read_to_string(&mut errors).expect("its errors");
        let mut stdout = self.child.stdout.take().expect("its output");
        stdout.read_to_string(&mut out).expect("its output");
        let status = self.child.wait().expect("its end");
        (status.code(), out, errors)
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
fn bench_wire_measures_each_of_its_subjects() {
    let test = "bench_wire_measures_each_of_its_subjects";
    if !host::ready(test) {
        return;
    }
    if binary::installed("nft").is_none() {
        host::skip(test, "there is no nft");
        return;
    }
    let _alone = alone();
    let page = tempfile::NamedTempFile::new().expect("a file");
    let html = page.path().to_str().expect("a path of text");
    let run = Run::start(&["--rounds", "1", "--seconds", "0.05", "--json", "--html", html]);
    let pid = run.child.id();
    let (code, out, errors) = run.end();
    assert_eq!(code, Some(0), "{errors}");
    let report: Value = serde_json::from_str(&out).expect("JSON");
    let rows = |table: &str| report[table].as_array().expect("rows").clone();
    let forms = if report["processors"].as_u64() > Some(1) { 2 } else { 1 };
    let (frames, sockets) = (rows("frames"), rows("sockets"));
    assert_eq!((frames.len(), sockets.len()), (14 * forms, 5), "{out}");
    let mut html = String::new();
    File::open(page.path()).and_then(|mut f| f.read_to_string(&mut html)).expect("the page");
    for (row, figures) in frames
        .iter()
        .map(|row| (row, row))
        .chain(sockets.iter().flat_map(|row| [(row, &row["flat_out"]), (row, &row["paced"])]))
    {
        let subject = row["subject"].as_str().expect("a name");
        assert!(html.contains(subject), "{subject} is not on the page");
        let number = |name: &str| figures[name].as_f64().unwrap_or_else(|| panic!("{name}: {row}"));
        assert!(number("packets_per_second") > 1000.0, "{row}");
        assert!((0.0..1.0).contains(&number("lost")), "{row}");
    }
    // What only drops is no slower than what forwards by tracking connections, on any host.
    let rate = |subject: &str| {
        let row = frames.iter().find(|row| row["subject"] == subject && row["family"] == 4);
        row.and_then(|row| row["packets_per_second"].as_f64()).expect("a row")
    };
    assert!(rate("XDP_DROP") > rate("nftables, jhash + DNAT"), "{out}");
    assert_eq!(left_by(pid), Vec::<String>::new());
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
    let (code, _, errors) = run.end();
    assert_eq!(code, Some(130), "{errors}");
    assert!(errors.contains("interrupted"), "{errors}");
    assert_eq!(left_by(pid), Vec::<String>::new());
}
