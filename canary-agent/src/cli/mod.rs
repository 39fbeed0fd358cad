//! The commands of `canary-agent`.
//!
//! Owns the command line, what is printed, and exit codes. All but `run`, `check`,
//! `doctor`, `replay`, `decap`, `detach`, and `panic` while no agent answers, only speak to the control
//! socket; what they show is what any program can read there. Must not know of maps or plans.
//!
//! Results go to standard output. Errors go to standard error for people; with
//! `--json` they go to standard output as an
//! [`ErrorBody`](crate::api::model::ErrorBody), so that a program that reads it
//! gets JSON whatever happens.

mod args;
mod audience;
mod backend;
mod changes;
mod check;
mod client;
mod decap;
mod detach;
mod doctor;
mod events;
mod explain;
mod failure;
mod generate;
mod panic;
mod plan;
mod reload;
mod replay;
mod rollout;
mod settings;
mod split;
mod status;
mod text;
mod watch;

use std::{
    ffi::OsString,
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, error::ErrorKind};

use self::{
    args::{Cli, Command, Global},
    client::Client,
    failure::{Failure, exit},
};
use crate::telemetry::{LogFormat, init_logs};

/// Where the control socket is, if neither the command line nor the configuration says.
const DEFAULT_SOCKET: &str = "/run/canary/agent.sock";

/// What the daemon is told by its command line. Logs are set up already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunOptions {
    /// The configuration's main file.
    pub config: PathBuf,
    /// The control socket, if another than `agent.socket`.
    pub socket_override: Option<PathBuf>,
    /// Whether another XDP program on an interface is replaced.
    pub replace: bool,
    /// Whether pinned maps that can't be gone on with give way to new ones.
    pub rebuild: bool,
    /// How the log looks.
    pub log_format: LogFormat,
}

/// Runs the command that the process was started with.
///
/// Errors are printed here; the exit code says what kind they are.
pub fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => return usage(&error, wants_json(&arguments)),
    };
    let json = cli.global.json;
    match dispatch(cli) {
        Ok(code) => code,
        Err(failure) => {
            complain(&failure, json);
            ExitCode::from(failure.exit_code())
        }
    }
}

fn dispatch(cli: Cli) -> Result<ExitCode, Failure> {
    let Cli { global, command } = cli;
    let json = global.json;
    match command {
        Command::Run(run) => {
            init_logs(run.log_format);
            return Ok(crate::daemon::run(RunOptions {
                config: global.config,
                socket_override: global.socket,
                replace: run.replace,
                rebuild: run.rebuild,
                log_format: run.log_format,
            })?);
        }
        Command::Check => return check::run(&global.config, json),
        Command::Doctor => {
            return doctor::run(&global.config, global.socket.as_deref(), &client(&global), json);
        }
        Command::Diff => wait_for(reload::diff(&client(&global), json))?,
        Command::Reload(reload) => wait_for(reload::run(&client(&global), reload, json))?,
        Command::Status(status) => {
            let client = client(&global);
            if let (Some(limit), Some(service)) = (status.wait, &status.service) {
                let of = rollout::Of::Service(service);
                let show = async || status::block(&client, Some(service), json).await;
                return match status.watch {
                    true => wait_for(rollout::watch_until(&client, of, limit, json, show)),
                    false => wait_for(rollout::wait(&client, of, limit, json)),
                };
            }
            wait_for(async {
                if status.watch {
                    watch::run(&client, status.service.as_deref(), json).await
                } else {
                    status::run(&client, status.service.as_deref(), json).await
                }
            })?;
        }
        Command::Split(split) => wait_for(split::run(&client(&global), split, json))?,
        Command::Backend(backend) => wait_for(backend::run(&client(&global), backend, json))?,
        Command::Rollout(told) => return wait_for(rollout::run(&client(&global), told, json)),
        Command::Plan(asked) => wait_for(plan::run(&client(&global), asked, json))?,
        Command::Undo(undo) => wait_for(changes::undo(&client(&global), undo, json))?,
        Command::Panic(panic) => return panic::run(&global, panic, json),
        Command::Confirm(confirm) => wait_for(changes::confirm(&client(&global), confirm, json))?,
        Command::Freeze(freeze) => wait_for(changes::freeze(&client(&global), freeze, true, json))?,
        Command::Unfreeze(freeze) => {
            wait_for(changes::freeze(&client(&global), freeze, false, json))?;
        }
        Command::Events(asked) => wait_for(events::run(&client(&global), asked, json))?,
        Command::Audience(asked) => wait_for(audience::run(&client(&global), asked, json))?,
        Command::Explain(query) => wait_for(explain::run(&client(&global), query, json))?,
        Command::Replay(asked) => replay::run(&global.config, &asked, json)?,
        Command::Detach(detach) => {
            let client = client(&global);
            detach::run(&global.config, &client, detach.dry_run, json)?;
        }
        Command::Decap(asked) => decap::run(&asked, json)?,
        Command::Completions { shell } => generate::completions(shell)?,
        Command::Man { dir } => generate::man(dir.as_deref())?,
    }
    Ok(ExitCode::from(exit::DONE))
}

/// Runs a command that speaks to the agent.
fn wait_for<T>(command: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| {
            Failure::new("failed", exit::FAILED, format!("can't start a runtime: {error}"))
        })?
        .block_on(command)
}

/// The agent that the options mean.
fn client(global: &Global) -> Client {
    if let Some(socket) = &global.socket {
        return Client::new(socket.clone(), None);
    }
    let default = || PathBuf::from(DEFAULT_SOCKET);
    match settings::agent_path(&global.config, "socket") {
        Ok(socket) => Client::new(socket.unwrap_or_else(default), None),
        Err(error) if error.missing && global.config == Path::new(args::DEFAULT_CONFIG) => {
            Client::new(default(), None)
        }
        Err(error) => {
            let doubt =
                format!("; the configuration, which may name another, can't be read: {error}");
            Client::new(default(), Some(doubt))
        }
    }
}

/// Writes a result.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Writes an error to where it belongs.
fn complain(failure: &Failure, json: bool) {
    // Nobody can be told that nobody can be told.
    let _ = match (failure.json(), failure.text()) {
        (Some(line), _) if json => writeln!(io::stdout(), "{line}"),
        (_, Some(text)) => writeln!(io::stderr(), "{}", readable(&text)),
        _ => Ok(()),
    };
}

/// Text without what a terminal would obey, but with its lines.
fn readable(text: &str) -> String {
    let lines: Vec<String> = text.lines().map(text::plain).collect();
    lines.join("\n")
}

/// Whether errors of the command line itself are to be JSON: it could not be
/// read, so this looks for the very word.
fn wants_json(arguments: &[OsString]) -> bool {
    arguments.iter().take_while(|argument| *argument != "--").any(|argument| argument == "--json")
}

/// Ends with what clap has to say: help, the version, or what is wrong.
fn usage(error: &clap::Error, json: bool) -> ExitCode {
    let asked_for = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    if asked_for || !json {
        let written = error.print();
        // Help that was asked for is a result: nobody minds if it is cut short.
        drop(written);
    } else {
        let text = error.render().to_string();
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let first = lines.next().unwrap_or_default();
        let message = first.strip_prefix("error: ").unwrap_or(first).to_owned();
        let rest: Vec<&str> = lines.collect();
        complain(&Failure::new("usage", exit::USAGE, message).help(rest.join("; ")), true);
    }
    ExitCode::from(if asked_for { exit::DONE } else { exit::USAGE })
}

/// Whether results go to a person's terminal.
fn on_terminal() -> bool {
    io::stdout().is_terminal()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_found_where_clap_would() {
        let wants = |line: &str| {
            let arguments: Vec<OsString> = line.split(' ').map(Into::into).collect();
            wants_json(&arguments)
        };
        assert!(wants("canary-agent frob --json"));
        assert!(wants("canary-agent --json frob"));
        assert!(!wants("canary-agent frob -- --json"));
        assert!(!wants("canary-agent frob --jsonx"));
    }
}
