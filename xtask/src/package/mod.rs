//! `cargo xtask package`: a Debian package of the agent, and its test.
//!
//! The package's own files are in `packaging/`; completions, manual pages, dependencies and
//! the list of linked crates are made here ([`tree`], [`fields`]), and dpkg-deb packs them:
//! every Debian has it, and nothing has to be fetched.

mod crates;
mod fields;
mod musl;
mod tree;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::{
    progress::Progress,
    setup::{self, probe},
    supervise, tasks, vm,
};

/// The package's name.
const NAME: &str = "canary-agent";

/// Where the end-to-end tests find the package.
const PACKAGE: &str = "CANARY_PACKAGE";
/// Where they find a Debian to install it in.
const DEBIAN: &str = "CANARY_DEBIAN";
/// The end-to-end tests that use both.
const TESTS: &str = "packaged";

/// What `cargo xtask package` is asked for.
#[derive(Debug, Args)]
pub(crate) struct Request {
    /// Links everything into the program, C library too (musl).
    #[arg(long = "static")]
    linked_statically: bool,
    /// Packs the unoptimised program: quicker to build, for tests.
    #[arg(long)]
    debug: bool,
    /// Where the package goes [default: target/package].
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Looks at the package with lintian, and installs, upgrades and removes it in a Debian
    /// under systemd, with traffic.
    #[arg(long)]
    test: bool,
    /// The Debian release that it is tested in.
    #[arg(long, value_name = "RELEASE", default_value = "bookworm", requires = "test")]
    debian: String,
}

/// A package that has been built.
struct Built {
    package: PathBuf,
    binary_bytes: u64,
}

/// Builds the package, says where it is, and tests it if that is asked for.
///
/// # Errors
/// Something is missing (with what to install), the build or a tool fails, or the task is
/// interrupted.
pub(crate) fn run(workspace: &Path, request: &Request) -> Result<ExitCode> {
    let Request { linked_statically, debug, out, test, debian } = request;
    if *linked_statically {
        musl::ready(workspace)?;
    }
    setup::run(workspace, None)?;
    let mut progress = Progress::new();
    progress.step("building the agent: some minutes the first time");
    let mut build = tasks::cargo(workspace);
    build.args(["build", "--locked", "--package", "canary-agent", "--bins"]);
    if !debug {
        build.arg("--release");
    }
    let mut binary = tasks::target_folder(workspace);
    if *linked_statically {
        build.args(["--target", musl::TARGET]);
        binary.push(musl::TARGET);
    }
    binary.extend([if *debug { "debug" } else { "release" }, NAME]);
    if !supervise::run(&mut build)?.success() {
        bail!("the agent does not build");
    }
    let out = match out {
        Some(folder) => std::path::absolute(folder)?,
        None => tasks::target_folder(workspace).join("package"),
    };
    let built = pack(workspace, &binary, &out, *debug, &mut progress)?;
    progress.clear();
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "{}: {:.1} MiB, with a program of {:.1} MiB",
        built.package.display(),
        mib(fs::metadata(&built.package)?.len()),
        mib(built.binary_bytes)
    );
    if !test {
        return Ok(ExitCode::SUCCESS);
    }
    let mut success = lintian(&built.package)?;
    let mut tests = tasks::cargo(workspace);
    tests.args(["test", "--package", "canary-tests", "--test", "e2e", TESTS]);
    tests.env(PACKAGE, &built.package).env(DEBIAN, vm::debian_root(debian)?).env("CI", "true");
    success &= supervise::run(&mut tests)?.success();
    Ok(if success { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// For `cargo test`: a package of what `cargo build` has built already, and a Debian to
/// install it in. Where there can be none, the tests say that they are skipped.
///
/// # Errors
/// The package can't be made, or the task is interrupted.
pub(crate) fn for_tests(workspace: &Path, profile: &str) -> Result<Vec<(&'static str, PathBuf)>> {
    let present = |tool: &&str| probe::find(tool).is_some();
    if !setup::is_root() || !["apt-get", "dpkg-deb", "perl"].iter().all(present) {
        return Ok(Vec::new());
    }
    let target = tasks::target_folder(workspace);
    let binary = target.join(profile).join(NAME);
    let built =
        pack(workspace, &binary, &target.join("package/tests"), true, &mut Progress::new())?;
    match vm::debian_root("bookworm") {
        Ok(root) => Ok(vec![(PACKAGE, built.package), (DEBIAN, root)]),
        Err(error) if error.is::<supervise::Interrupted>() => Err(error),
        Err(error) => {
            eprintln!("xtask: there is no Debian to install the package in: {error:#}");
            Ok(Vec::new())
        }
    }
}

/// Whether a choice of tests is about the package, too.
pub(crate) fn concerned(args: &[String]) -> bool {
    args.iter().any(|arg| arg.contains(TESTS))
}

/// Packs a program that has been built. `quick` packs loosely.
fn pack(
    workspace: &Path,
    binary: &Path,
    out: &Path,
    quick: bool,
    progress: &mut Progress,
) -> Result<Built> {
    for (tool, package) in
        [("dpkg-deb", "dpkg"), ("strip", "binutils"), ("readelf", "binutils"), ("gzip", "gzip")]
    {
        if probe::find(tool).is_none() {
            bail!("the program `{tool}` is missing: apt-get install {package}");
        }
    }
    let release = fields::Release::read(workspace)?;
    let made = || format!("making {}", out.display());
    fs::create_dir_all(out).with_context(made)?;
    let stage = Stage(out.join(format!("stage.{}", std::process::id())));
    if stage.0.exists() {
        fs::remove_dir_all(&stage.0).with_context(made)?;
    }
    progress.step("collecting the package's files");
    let binary_bytes = tree::fill(workspace, binary, &stage.0, &release)?;
    let architecture = fields::architecture()?;
    let package = out.join(format!("{NAME}_{}_{architecture}.deb", release.version));
    progress.step("packing them");
    let mut command = Command::new("dpkg-deb");
    command.args(if quick { ["-Zgzip", "-z1"] } else { ["-Zxz", "-z6"] });
    command.args(["--root-owner-group", "--build"]).arg(&stage.0).arg(&package);
    output_of(command.env("SOURCE_DATE_EPOCH", release.epoch.to_string()))?;
    Ok(Built { package, binary_bytes })
}

/// Whether lintian has nothing to say, or is not there.
fn lintian(package: &Path) -> Result<bool> {
    if probe::find("lintian").is_none() {
        eprintln!("xtask: lintian is missing, and was left out: apt-get install lintian");
        return Ok(true);
    }
    let mut command = Command::new("lintian");
    if setup::is_root() {
        command.arg("--allow-root");
    }
    command.args(["--fail-on", "error,warning", "--tag-display-limit", "0"]).arg(package);
    let clean = supervise::run(&mut command)?.success();
    println!("lintian: {}", if clean { "clean" } else { "not clean" });
    Ok(clean)
}

/// A folder of files that is gone with the value.
struct Stage(PathBuf);

impl Drop for Stage {
    fn drop(&mut self) {
        // It lies in `target`: `cargo clean` takes what may be left.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What a tool prints, which must succeed.
fn output_of(command: &mut Command) -> Result<Vec<u8>> {
    supervise::check()?;
    let name = command.get_program().to_string_lossy().into_owned();
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("running {name}"))?;
    if !output.status.success() {
        bail!("{name} failed ({}):\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}
