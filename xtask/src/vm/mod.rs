//! `cargo xtask vm`: other kernels than the host's, each in a virtual machine that is
//! made for one run.
//!
//! A machine has a Debian kernel ([`debian`]) or one that is given, an initramfs that
//! is written for the run ([`guest`]), two virtio interfaces on one wire, and no disk.
//! KVM is used where the processor has it; emulation does otherwise.

mod cpio;
mod debian;
mod guest;
mod machine;
mod modules;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use self::{debian::Kernel, guest::Job};
pub(crate) use self::{debian::root as debian_root, machine::Size};
use crate::{supervise, tasks};

/// The Debian release whose kernel, 6.1, is the oldest that is supported.
const OLDEST: &str = "bookworm";
/// One whose kernel, 5.10, is older.
const TOO_OLD: &str = "bullseye";

/// The test programs that run on [`OLDEST`], with what each is told. Of the end-to-end tests an
/// agent that ends and comes back under traffic, and what is about the kernel's own networking: all
/// of them take too long where the processor is emulated. The packet cases come last: some wait
/// until the machine is as old as the silence that they are about.
const TESTS: [(&str, &[&str]); 5] = [
    ("verifier", &["--nocapture"]),
    ("decap", &[]),
    ("datapath", &[]),
    ("e2e", &["lifecycle::small_tables", "networks::clients_and_backends_in_vlans", "receivers::"]),
    ("packet_cases", &[]),
];

/// How large a machine for the tests is. Emulated on an idle host of two processors it needs a third
/// of this limit, which is for hosts with other work.
pub(crate) const SIZE: Size = Size { cpus: 2, memory_mib: 2048, limit: Duration::from_secs(900) };

/// What `cargo xtask vm` is asked for.
#[derive(Debug, Args)]
pub(crate) struct Request {
    /// Boots this kernel image.
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// The folder of that kernel's modules; without, what is needed must be built in.
    #[arg(long, requires = "kernel")]
    modules: Option<PathBuf>,
    /// Boots the kernel of this Debian release.
    #[arg(long, default_value = OLDEST, conflicts_with = "kernel")]
    debian: String,
    /// Processors of the machine.
    #[arg(long, default_value_t = SIZE.cpus)]
    cpus: u32,
    /// Memory of the machine, in MiB.
    #[arg(long, default_value_t = SIZE.memory_mib)]
    memory: u32,
    /// Seconds until the machine is ended.
    #[arg(long, default_value_t = SIZE.limit.as_secs())]
    limit: u64,
    /// A file or folder that is taken along, to the same place; may be given again.
    #[arg(long = "file", requires = "command")]
    files: Vec<PathBuf>,
    /// A program that is taken along with its libraries; may be given again.
    #[arg(long = "with", requires = "command")]
    programs: Vec<PathBuf>,
    /// Runs this program with its arguments instead of the tests.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

impl Request {
    fn size(&self) -> Size {
        let Self { cpus, memory, limit, .. } = *self;
        Size { cpus, memory_mib: memory, limit: Duration::from_secs(limit) }
    }

    fn kernel(&self) -> Result<Kernel> {
        match &self.kernel {
            Some(image) => Ok(Kernel { image: image.clone(), modules: self.modules.clone() }),
            None => debian::kernel(&self.debian),
        }
    }
}

/// Why no virtual machine can run here, if so.
pub(crate) fn obstacle() -> Option<String> {
    if !cfg!(target_arch = "x86_64") {
        return Some(
            "virtual machines are of this host's kind, and made for x86-64 only".to_owned(),
        );
    }
    machine::obstacle()
}

/// Runs a command, or the tests, in a virtual machine.
///
/// # Errors
/// The machine can't be made or does not come to its end, or the task is interrupted.
pub(crate) fn run(workspace: &Path, request: &Request) -> Result<ExitCode> {
    if let Some(obstacle) = obstacle() {
        bail!(obstacle);
    }
    let print = |line: &str| println!("{line}");
    if request.command.is_empty() && request.kernel.is_none() && request.debian == OLDEST {
        let success = prepared(workspace, &[])?.run(request.size(), print)?;
        return Ok(if success { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let mut job = match request.command.is_empty() {
        true => tests(workspace, &[])?,
        false => Job::default(),
    };
    job.programs.extend(absolute(&request.programs)?);
    job.files.extend(absolute(&request.files)?);
    let mut command = request.command.clone();
    if let Some(first) = command.first_mut() {
        // A program of the host's; else one that the machine has.
        if let Ok(path) = fs::canonicalize(&*first) {
            *first = path.to_str().context("the program's path is no text")?.to_owned();
            job.programs.insert(path);
        }
        job.commands.push(command);
    }
    let ended = boot(workspace, &request.kernel()?, &job, request.size(), print)?;
    Ok(ExitCode::from(ended.code))
}

fn absolute(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let absolute = |path: &PathBuf| {
        fs::canonicalize(path).with_context(|| format!("{} can't be found", path.display()))
    };
    paths.iter().map(absolute).collect()
}

/// The tests that are about kernels, built, with all that their machines need at hand.
pub(crate) struct Prepared<'a> {
    workspace: &'a Path,
    profile: &'a [String],
    job: Job,
}

/// Builds the tests, and fetches or installs what their machines need.
///
/// # Errors
/// The tests do not build, something can't be had, or the task is interrupted.
pub(crate) fn prepared<'a>(workspace: &'a Path, profile: &'a [String]) -> Result<Prepared<'a>> {
    machine::qemu()?;
    debian::busybox()?;
    for release in [OLDEST, TOO_OLD] {
        debian::kernel(release)?;
    }
    Ok(Prepared { workspace, profile, job: tests(workspace, profile)? })
}

impl Prepared<'_> {
    /// Runs them; each line of their output is handed over. Returns whether all went well.
    ///
    /// # Errors
    /// A machine does not come to its end, or the task is interrupted.
    pub(crate) fn run(&self, size: Size, mut on_line: impl FnMut(&str)) -> Result<bool> {
        let Self { workspace, profile, job } = self;
        let ended = boot(workspace, &debian::kernel(OLDEST)?, job, size, &mut on_line)?;
        let refused = old_kernel(workspace, profile, size)?;
        for line in refused.lines() {
            on_line(line);
        }
        Ok(ended.code == 0 && refused.ends_with(REFUSED))
    }
}

/// The end of what [`old_kernel`] says when all is well; counted like a test program's.
const REFUSED: &str = "test result: ok. 1 passed; 0 failed; 0 ignored";

/// Starts the agent on a kernel that is too old for it.
fn old_kernel(workspace: &Path, profile: &[String], size: Size) -> Result<String> {
    let folder = Folder::new(workspace)?;
    let config = folder.0.join("agent.toml");
    fs::write(&config, AGENT).with_context(|| format!("writing {}", config.display()))?;
    let agent =
        tasks::target_folder(workspace).join(tasks::profile_folder(profile)).join("canary-agent");
    let text = |path: &Path| path.to_str().map(str::to_owned).context("a path is no text");
    let command = [&text(&agent)?, "--config", &text(&config)?, "run"].map(str::to_owned);
    let job = Job {
        programs: BTreeSet::from([agent]),
        files: BTreeSet::from([config]),
        commands: vec![
            command.to_vec(),
            // Nothing of it may be left.
            ["sh", "-c", "ls /sys/fs/bpf /var/lib/canary /run/canary; exit 42"]
                .map(str::to_owned)
                .into(),
        ],
        env: BTreeMap::new(),
    };
    let mut said = Vec::new();
    let ended =
        boot(workspace, &debian::kernel(TOO_OLD)?, &job, size, |line| said.push(line.to_owned()))?;
    let said = said.join("\n");
    let wanted = format!("this host runs Linux {}, and 6.1 or newer is needed", ended.release);
    let name = format!("test vm::linux_{}_is_refused", ended.release);
    Ok(if said.contains(&wanted) && ended.code == 42 {
        format!("{name} ... ok\n{REFUSED}")
    } else {
        format!(
            "{name} ... FAILED\n{said}\nit should have said: {wanted}\n\
             test result: FAILED. 0 passed; 1 failed; 0 ignored"
        )
    })
}

/// A configuration without fault.
const AGENT: &str = r#"[agent]
interfaces = ["lo"]

[[service]]
name = "shop"
vip = ["203.0.113.10"]
ports = ["tcp/80"]
forward = "nat"
control = "stable"

[service.versions.stable]
backends = ["192.0.2.1:80"]
"#;

/// Builds [`TESTS`] and the agent, and says how they are run.
fn tests(workspace: &Path, profile: &[String]) -> Result<Job> {
    let mut agent = tasks::cargo(workspace);
    agent.args(["build", "--bins"]).args(tasks::ALL).args(profile);
    if !supervise::run(&mut agent)?.success() {
        bail!("the agent does not build");
    }
    let mut build = tasks::cargo(workspace);
    build.args(["test", "--no-run"]).args(tasks::ALL).args(profile);
    build.args(["--message-format", "json-render-diagnostics"]).stderr(Stdio::null());
    for (name, _) in TESTS {
        build.args(["--test", name]);
    }
    let mut built = BTreeMap::new();
    let status = supervise::run_stdout(&mut build, |line| built.extend(executable(line)))?;
    if !status.success() {
        bail!("the tests do not build");
    }
    let mut job = Job::default();
    let agent =
        tasks::target_folder(workspace).join(tasks::profile_folder(profile)).join("canary-agent");
    job.programs.insert(agent);
    job.files.insert(workspace.join("tests/cases"));
    job.files.insert(workspace.join("tests/verifier.toml"));
    job.files.insert(workspace.join("tests/decap.toml"));
    for (name, args) in TESTS {
        let program = built.get(name).with_context(|| format!("cargo has built no {name}"))?;
        let mut command = vec![program.clone()];
        command.extend(args.iter().map(ToString::to_string));
        job.commands.push(command);
        job.programs.insert(program.into());
    }
    // What can't be run there has failed: the machine is made for it.
    job.env.insert("CI".to_owned(), "true".to_owned());
    job.env.insert("CANARY_VM".to_owned(), "1".to_owned());
    job.env.insert("RUST_BACKTRACE".to_owned(), "1".to_owned());
    for seed in ["CANARY_SEED", "PROPTEST_RNG_SEED"] {
        if let Ok(value) = std::env::var(seed) {
            job.env.insert(seed.to_owned(), value);
        }
    }
    if !machine::kvm() {
        // It is slower by ten, and a host may have other work.
        job.env.insert("CANARY_SLOWNESS".to_owned(), "20".to_owned());
    }
    Ok(job)
}

/// Name and path of the test program in a line of cargo's.
fn executable(line: &str) -> Option<(String, String)> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    let name = message.get("target")?.get("name")?.as_str()?;
    Some((name.to_owned(), message.get("executable")?.as_str()?.to_owned()))
}

/// One run of a machine.
fn boot(
    workspace: &Path,
    kernel: &Kernel,
    job: &Job,
    size: Size,
    on_line: impl FnMut(&str),
) -> Result<machine::Ended> {
    let started = Instant::now();
    let modules = match &kernel.modules {
        Some(folder) => modules::wanted(folder)?,
        None => Vec::new(),
    };
    let folder = Folder::new(workspace)?;
    let initramfs = folder.0.join("initramfs");
    job.write(&initramfs, &debian::busybox()?, &modules)?;
    let ended = machine::run(&kernel.image, &initramfs, size, on_line)?;
    let took = started.elapsed().as_secs_f64();
    eprintln!("a virtual machine with Linux {} ran for {took:.0} s", ended.release);
    Ok(ended)
}

/// A folder in `target` that is gone with the value.
struct Folder(PathBuf);

impl Folder {
    fn new(workspace: &Path) -> Result<Self> {
        let name = |number: u32| format!("vm.{}.{number}", std::process::id());
        for number in 0.. {
            let path = workspace.join("target").join(name(number));
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Self(path)),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => bail!("making {}: {error}", path.display()),
            }
        }
        bail!("no name is left for a folder")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // It lies in `target`: `cargo clean` takes what may be left.
        let _ = fs::remove_dir_all(&self.0);
    }
}
