//! The real agent in the balancer's namespace, driven by its real command line.

use std::{
    fs::{self, File},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use canary_agent::api::model::{ChangeReport, Status};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::de::DeserializeOwned;

use crate::{binary, netns::Namespace, spawn, topology::Topology, wait, workdir::Workdir};

/// Lines of the log that a failure shows.
const LOG_LINES: usize = 40;

/// What a command printed and how it ended.
#[derive(Clone, Debug)]
pub struct Output {
    /// The exit code; -1 if a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// The output as JSON.
    ///
    /// # Panics
    /// It is none of this type.
    #[track_caller]
    pub fn json<T: DeserializeOwned>(&self) -> T {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error} in {}{}", self.stdout, self.stderr))
    }
}

/// What the `[agent]` table says besides the places, which are the harness's.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// `agent.interfaces`.
    pub interfaces: Vec<String>,
    /// `agent.xdp_mode`.
    pub xdp_mode: String,
    /// `agent.listen`.
    pub listen: String,
    /// More lines of the table.
    pub extra: String,
}

impl AgentOptions {
    /// All of a topology's interfaces, native, with no TCP listener.
    pub fn native(topology: &Topology) -> Self {
        Self {
            interfaces: topology.interfaces().iter().map(ToString::to_string).collect(),
            xdp_mode: "native".to_owned(),
            listen: "off".to_owned(),
            extra: String::new(),
        }
    }

    /// The same in generic mode.
    pub fn generic(topology: &Topology) -> Self {
        Self { xdp_mode: "generic".to_owned(), ..Self::native(topology) }
    }
}

/// A balancer's agent: stopped, detached and gone on drop.
#[derive(Debug)]
pub struct Agent<'a> {
    namespace: &'a Namespace,
    binary: PathBuf,
    workdir: Workdir,
    child: Option<Child>,
    ran: bool,
}

impl<'a> Agent<'a> {
    /// Writes the configuration, starts `canary-agent run` and waits until it
    /// answers and its program is on every interface.
    ///
    /// `services` is everything of the configuration after the `[agent]` table.
    ///
    /// # Panics
    /// It does not come up: with the end of its log.
    #[track_caller]
    pub fn start(topology: &'a Topology, options: &AgentOptions, services: &str) -> Self {
        let mut agent = Self::prepare(&topology.balancer, options, services);
        agent.run();
        agent.wait_ready();
        agent
    }

    /// Writes the configuration, and starts nothing.
    ///
    /// # Panics
    /// The program is not built.
    #[track_caller]
    pub fn prepare(namespace: &'a Namespace, options: &AgentOptions, services: &str) -> Self {
        let agent = Self {
            namespace,
            binary: binary::locate("canary-agent"),
            workdir: Workdir::new("agent"),
            child: None,
            ran: false,
        };
        agent.configure(options, services);
        agent
    }

    /// Goes on with another program of the workspace from the next start on.
    ///
    /// # Panics
    /// It is not built.
    #[track_caller]
    pub fn upgrade(&mut self, name: &str) {
        self.binary = binary::locate(name);
    }

    /// The same with the program at a path.
    pub fn upgrade_to(&mut self, binary: &Path) {
        binary.clone_into(&mut self.binary);
    }

    /// Writes the configuration anew.
    ///
    /// # Panics
    /// It can't be written.
    #[track_caller]
    pub fn configure(&self, options: &AgentOptions, services: &str) {
        let text = format!(
            "[agent]\ninterfaces = {:?}\nxdp_mode = {:?}\nlisten = {:?}\nsocket = {:?}\n\
             state_dir = {:?}\nbpffs = {:?}\n{}\n\n{services}\n",
            options.interfaces,
            options.xdp_mode,
            options.listen,
            self.socket(),
            self.workdir.path().join("state"),
            self.pins(),
            options.extra,
        );
        let path = self.config();
        fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// Starts `canary-agent run`; its output goes to [`Agent::log`].
    ///
    /// # Panics
    /// It runs already, or can't be started.
    #[track_caller]
    pub fn run(&mut self) {
        self.run_with(|_| {});
    }

    /// The same after a change to the command.
    ///
    /// # Panics
    /// It runs already, or can't be started.
    #[track_caller]
    pub fn run_with(&mut self, change: impl FnOnce(&mut Command)) {
        assert!(self.child.is_none(), "the agent is running");
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .expect("the agent's log");
        let mut command = self.command(&["run"]);
        command.stdout(log.try_clone().expect("the agent's log")).stderr(log);
        change(&mut command);
        self.child = Some(spawn::spawn(command).expect("starting the agent"));
        self.ran = true;
    }

    /// Waits until the agent answers and its program is on every interface.
    ///
    /// # Panics
    /// It ends, or that takes too long: with the end of its log.
    #[track_caller]
    pub fn wait_ready(&mut self) -> Status {
        let mut last = String::new();
        let deadline = std::time::Instant::now() + wait::patience();
        wait::until_within(wait::patience() * 2, "the agent", || {
            if let Some(status) = self.ended() {
                panic!("the agent ended ({status}):\n{}", self.log_tail());
            }
            assert!(
                std::time::Instant::now() < deadline,
                "the agent is not ready: {last}\n{}",
                self.log_tail()
            );
            // A command takes much of an emulated processor that the agent needs for its start.
            UnixStream::connect(self.socket())
                .map_err(|error| format!("the socket: {error}"))
                .and_then(|_| self.ready_now())
                .inspect_err(|reason| last.clone_from(reason))
        })
    }

    /// Whether the agent answers and its program is on every interface.
    ///
    /// # Errors
    /// What is not so.
    pub fn ready_now(&self) -> Result<Status, String> {
        let output = self.cli(&["status", "--json"]);
        if output.code != 0 {
            return Err(output.stderr + &output.stdout);
        }
        let status: Status = output.json();
        let absent = status.interfaces.iter().find(|interface| interface.mode.is_none());
        match absent {
            Some(interface) => Err(format!("{}: {:?}", interface.name, interface.message)),
            None if status.interfaces.is_empty() => Err("no interface".to_owned()),
            None => Ok(status),
        }
    }

    /// How the process ended, if it did by itself; [`Agent::stop`] comes after it.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.try_wait().ok().flatten()
    }

    /// A command of the agent's command line, with `--config` and `--socket` of this agent.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.namespace.command(&self.binary);
        command
            .arg("--config")
            .arg(self.config())
            .arg("--socket")
            .arg(self.socket())
            .args(args)
            .env_remove("CANARY_CONFIG")
            .env_remove("CANARY_SOCKET");
        command
    }

    /// Runs a command of the command line to its end.
    ///
    /// # Panics
    /// It can't be started.
    #[track_caller]
    pub fn cli(&self, args: &[&str]) -> Output {
        let mut command = self.command(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = spawn::spawn(command)
            .and_then(Child::wait_with_output)
            .unwrap_or_else(|error| panic!("canary-agent {}: {error}", args.join(" ")));
        Output {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Runs a command with `--json` that must succeed.
    ///
    /// # Panics
    /// It fails, or prints something else.
    #[track_caller]
    pub fn json<T: DeserializeOwned>(&self, args: &[&str]) -> T {
        let args = [args, &["--json"]].concat();
        let output = self.cli(&args);
        assert_eq!(
            output.code,
            0,
            "canary-agent {}: {}{}",
            args.join(" "),
            output.stdout,
            output.stderr
        );
        output.json()
    }

    /// `status --json`.
    ///
    /// # Panics
    /// The command fails.
    #[track_caller]
    pub fn status(&self) -> Status {
        self.json(&["status"])
    }

    /// `split SERVICE VERSION=SHARE --json`.
    ///
    /// # Panics
    /// The command fails.
    #[track_caller]
    pub fn split(&self, service: &str, version: &str, share: &str) -> ChangeReport {
        self.json(&["split", service, &format!("{version}={share}")])
    }

    /// Ends the process with a signal and waits for it; pins and traffic stay.
    ///
    /// # Panics
    /// It does not end.
    #[track_caller]
    pub fn stop(&mut self, signal: Signal) -> ExitStatus {
        let status = self.end(signal).expect("the agent is not running");
        status.unwrap_or_else(|| panic!("the agent did not end:\n{}", self.log_tail()))
    }

    /// `None` if nothing runs, `Some(None)` if it had to be killed.
    fn end(&mut self, signal: Signal) -> Option<Option<ExitStatus>> {
        let mut child = self.child.take()?;
        let pid = Pid::from_raw(i32::try_from(child.id()).ok()?);
        // The child is not reaped yet, so the id is still its own.
        let _ = kill(pid, signal);
        let deadline = std::time::Instant::now() + wait::patience();
        while std::time::Instant::now() < deadline {
            if let Ok(Some(status)) = child.try_wait() {
                return Some(Some(status));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = child.kill();
        let _ = child.wait();
        Some(None)
    }

    /// Path of the configuration.
    pub fn config(&self) -> PathBuf {
        self.workdir.path().join("agent.toml")
    }

    /// Path of the control socket.
    pub fn socket(&self) -> PathBuf {
        self.workdir.path().join("agent.sock")
    }

    /// `agent.bpffs`.
    pub fn pins(&self) -> PathBuf {
        self.workdir.bpffs().join("canary")
    }

    /// Path of the program.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// The folder that holds all of it.
    pub fn folder(&self) -> &Path {
        self.workdir.path()
    }

    /// The process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    fn log_path(&self) -> PathBuf {
        self.workdir.path().join("agent.log")
    }

    /// How long the agent took from the last verdict of a rollout, or an operator's word, until the
    /// share was back in the tables, as its log says.
    pub fn gave_back_within(&self) -> Option<Duration> {
        let log = self.log();
        let line = log.lines().rev().find(|line| line.contains("the share is"))?;
        let took = line.split("took_us=").nth(1)?.split(' ').next()?;
        took.parse().ok().map(Duration::from_micros)
    }

    /// What the agent has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        self.end(Signal::SIGTERM);
        if self.ran {
            // Where the command line is broken, the bpffs and the namespace go all the same.
            let mut command = self.command(&["detach"]);
            command.stdout(Stdio::null()).stderr(Stdio::null());
            let _ = spawn::spawn(command).and_then(|mut child| child.wait());
        }
        if std::thread::panicking() && !wait::interrupted() {
            eprintln!("the agent's log:\n{}", self.log_tail());
        }
    }
}
