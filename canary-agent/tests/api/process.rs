//! The built binary as a process.

use std::process::{Command, Output, Stdio};

use canary_agent::api::model::ErrorBody;

use crate::support::Agent;

/// A command without the environment's ideas of where things are.
pub(crate) fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_canary-agent"));
    command
        .args(arguments)
        .env_remove("CANARY_CONFIG")
        .env_remove("CANARY_SOCKET")
        .stdin(Stdio::null());
    command
}

pub(crate) fn run(arguments: &[&str]) -> Output {
    command(arguments).output().expect("started")
}

/// The same with the agent's socket before everything else.
pub(crate) fn ask(agent: &Agent, arguments: &[&str]) -> Output {
    let socket = agent.socket();
    let mut all = vec!["--socket", socket.to_str().expect("text")];
    all.extend_from_slice(arguments);
    run(&all)
}

pub(crate) fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).expect("text")
}

pub(crate) fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).expect("text")
}

/// The error body on standard output, and its agreement with the exit code.
pub(crate) fn json_error(output: &Output) -> ErrorBody {
    let text = stdout(output);
    assert_eq!(stderr(output), "", "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    let body: ErrorBody = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert_eq!(output.status.code(), Some(body.error.exit_code.into()), "{text}");
    body
}

pub(crate) fn code(output: &Output) -> i32 {
    output.status.code().expect("no signal")
}
