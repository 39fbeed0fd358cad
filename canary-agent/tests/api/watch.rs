//! `status --watch`, on a pipe and on a terminal.

use std::{
    fs,
    io::{self, Read},
    os::fd::{FromRawFd, OwnedFd},
    process::{Child, Stdio},
    time::Duration,
};

use canary_agent::api::Limits;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    process::{ask, code, command, stderr, stdout},
    support::Agent,
};

/// Starts `status --watch` with its output at `stdout`.
fn watch(agent: &Agent, more: &[&str], stdout: Stdio) -> Child {
    let socket = agent.socket();
    let mut arguments = vec!["--socket", socket.to_str().expect("text"), "status", "--watch"];
    arguments.extend_from_slice(more);
    let mut command = command(&arguments);
    command.stdout(stdout).stderr(Stdio::piped());
    command.spawn().expect("started")
}

/// Lets it run for a while, then presses Ctrl-C.
fn interrupt_after(child: &Child, time: Duration) {
    std::thread::sleep(time);
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
    kill(pid, Signal::SIGINT).expect("interrupted");
}

#[tokio::test(flavor = "multi_thread")]
async fn watching_a_pipe_is_one_object_a_line() {
    let agent = Agent::start(Limits::default()).await;
    let child = watch(&agent, &["--json"], Stdio::piped());
    interrupt_after(&child, Duration::from_millis(3500));
    let output = child.wait_with_output().expect("ended");
    assert_eq!(code(&output), 0, "{output:?}");
    let lines: Vec<Value> =
        stdout(&output).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!((2..=5).contains(&lines.len()), "{}", lines.len());
    assert!(lines.iter().all(|line| line["agent"]["revision"] == 7));
}

#[tokio::test(flavor = "multi_thread")]
async fn watching_survives_a_restart_of_the_agent() {
    let mut agent = Agent::start(Limits::default()).await;
    let child = watch(&agent, &["--json"], Stdio::piped());
    std::thread::sleep(Duration::from_millis(500));
    agent.stop().await;
    interrupt_after(&child, Duration::from_millis(2500));
    let output = child.wait_with_output().expect("ended");
    assert_eq!(code(&output), 0, "{output:?}");
    let last: Value =
        serde_json::from_str(stdout(&output).lines().last().expect("a line")).expect("JSON");
    assert_eq!(last["error"]["code"], "unreachable");
    // From the start, though, it is a failure.
    assert_eq!(code(&ask(&agent, &["status", "--watch"])), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn watching_on_a_terminal_leaves_it_as_it_was() {
    let agent = Agent::start(Limits::default()).await;
    let (mut master, mut slave) = (0, 0);
    // SAFETY: both integers are written by openpty; name, termios and window size
    // may be null.
    let opened = unsafe {
        libc::openpty(
            &mut master,
            &mut slave,
            std::ptr::null_mut(),
            std::ptr::null(),
            std::ptr::null(),
        )
    };
    assert_eq!(opened, 0, "{}", io::Error::last_os_error());
    // SAFETY: openpty has just given these descriptors to us alone.
    let (master, slave) = unsafe { (fs::File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
    let mut child = watch(&agent, &[], slave.into());
    let reader = std::thread::spawn(move || {
        let mut seen = Vec::new();
        // EIO when the last writer has gone.
        let _ = (&master).read_to_end(&mut seen);
        String::from_utf8(seen).expect("text")
    });
    interrupt_after(&child, Duration::from_millis(1500));
    assert_eq!(child.wait().expect("ended").code(), Some(0));
    let seen = reader.join().expect("read");
    assert!(seen.starts_with("\x1b[?1049h\x1b[?25l\x1b[H"), "{seen:?}");
    assert!(seen.ends_with("\x1b[?25h\x1b[?1049l"), "{seen:?}");
    assert!(seen.matches("canary-agent 0.1.0").count() >= 2, "drawn again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_leaves_is_no_panic() {
    let agent = Agent::start(Limits::default()).await;
    for more in [&[][..], &["--json"]] {
        let mut child = watch(&agent, more, Stdio::piped());
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("ended");
        assert_eq!((code(&output), stderr(&output)), (0, ""));
    }
    for arguments in [&["man"][..], &["completions", "zsh"], &["--help"], &["--json", "frob"]] {
        let mut child = command(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("ended");
        assert!(!stderr(&output).contains("panicked"), "{output:?}");
    }
}
