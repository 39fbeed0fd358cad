//! `cargo xtask test`, `lint`, `demo` and `bench`.

use std::{
    fmt,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, ExitStatus},
    time::Instant,
};

use anyhow::{Result, bail};

use crate::{package, setup, supervise, sweep, vm};

/// The file that skipped tests name themselves in.
const SKIP_LOG: &str = "CANARY_SKIP_LOG";

/// The folder of what is built with these arguments of cargo's.
pub(crate) fn profile_folder(args: &[String]) -> &'static str {
    if args.iter().any(|arg| arg == "--release") { "release" } else { "debug" }
}

/// What the benchmark ends with where it can't compare.
const SKIPPED: i32 = 3;

/// Lines of the output of a test that has failed which are said again at the end.
const LINES_AGAIN: usize = 40;

/// What all test programs of a run together did.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
    failures: Failures,
}

/// What the tests that have failed said, each with its name before it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Failures {
    lines: Vec<String>,
    /// How many lines more are taken of the present one, if one is being said.
    room: Option<usize>,
}

impl Failures {
    /// Takes a line of a test program, which says what failed after all of its tests, and then lists the
    /// names.
    fn add(&mut self, line: &str) {
        let name = line.strip_prefix("---- ").and_then(|line| line.strip_suffix(" stdout ----"));
        if let Some(name) = name {
            self.lines.push(format!("failed: {name}"));
            self.room = Some(LINES_AGAIN);
        } else if line == "failures:" || line.starts_with("test result: ") {
            self.room = None;
        } else if let Some(room) = self.room.as_mut().filter(|room| **room > 0)
            && !line.is_empty()
        {
            *room -= 1;
            self.lines.push(format!("    {line}"));
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

impl Tally {
    /// Adds a line `test result: ok. 5 passed; 0 failed; 1 ignored; …`.
    fn add(&mut self, line: &str) {
        self.failures.add(line);
        let Some(result) = line.strip_prefix("test result: ") else {
            return;
        };
        let counts = result.split_once(". ").map_or(result, |(_, counts)| counts);
        for part in counts.split(';') {
            let Some((number, what)) = part.trim().split_once(' ') else {
                continue;
            };
            let Ok(number) = number.parse::<u64>() else {
                continue;
            };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.skipped += number,
                _ => {}
            }
        }
    }
}

/// The packages with tests; features of the dependencies are those of this choice.
pub(crate) const ALL: [&str; 3] = ["--workspace", "--exclude", "canary-ebpf"];

/// Arguments of `cargo test` that choose packages or targets themselves.
const CHOOSING: [&str; 10] = [
    "-p",
    "--package",
    "--workspace",
    "--lib",
    "--bin",
    "--bins",
    "--test",
    "--tests",
    "--doc",
    "--all-targets",
];

/// Runs every test of the workspace, the quick native ones first; `args` go to cargo test.
///
/// The last line of the output counts all of them.
///
/// # Errors
/// The task is interrupted.
pub(crate) fn test(workspace: &Path, args: &[String]) -> Result<ExitCode> {
    let mut tally = Tally::default();
    let success = match test_all(workspace, args, &mut tally) {
        Ok(success) => success,
        Err(error) if error.is::<supervise::Interrupted>() => return Err(error),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            tally.failed += 1;
            false
        }
    };
    // Else they are far up, where other tests, and other machines', come after them.
    for line in &tally.failures.lines {
        println!("{line}");
    }
    println!("{tally}");
    Ok(if success { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn test_all(workspace: &Path, args: &[String], tally: &mut Tally) -> Result<bool> {
    setup::run(workspace, None)?;
    setup::clients::ensure()?;
    // End-to-end tests start the agent, which cargo builds for its own tests only.
    let profile = args.iter().filter(|arg| *arg == "--release");
    let built = supervise::run(cargo(workspace).args(["build", "--bins"]).args(ALL).args(profile))?;
    if !built.success() {
        bail!("the workspace does not build");
    }
    let profile = args.iter().filter(|arg| *arg == "--release");
    // The agent of another layout, with which that of the release trades places. Of all packages,
    // so that what it depends on is not built with other features.
    let next = ["--features", "canary-agent/next-abi", "--bin", "canary-agent-next"];
    let built = supervise::run(cargo(workspace).arg("build").args(ALL).args(next).args(profile))?;
    if !built.success() {
        bail!("the agent of another layout does not build");
    }
    let packaged = if !chosen(args) || package::concerned(args) {
        package::for_tests(workspace, profile_folder(args))?
    } else {
        Vec::new()
    };
    let skip_log = SkipLog::new(workspace);
    let run = |phase: &[&str], tally: &mut Tally| -> Result<bool> {
        let mut command = cargo(workspace);
        command.arg("test");
        if !args.iter().any(|arg| arg == "-p" || arg.starts_with("--package")) {
            command.args(ALL);
        }
        command
            .args(phase)
            // One failure does not hide the others.
            .arg("--no-fail-fast")
            .args(args)
            .envs(packaged.iter().map(|(name, path)| (name, path)))
            .env(SKIP_LOG, &skip_log.path);
        let failed = tally.failed;
        let status = run_tests(&mut command, tally)?;
        // Tests that do not compile have no result line to count.
        if !status.success() && tally.failed == failed {
            tally.failed += 1;
        }
        Ok(status.success())
    };
    let success = if chooses(args) {
        run(&[], tally)?
    } else {
        // Unit and property tests, then what talks to sockets, kernel and namespaces, the same on other
        // kernels, and the examples of the documentation.
        let quick = run(&["--lib", "--bins"], tally)?;
        let real = run(&["--test", "*"], tally)?;
        let other = match chosen(args) {
            true => true,
            // What keeps machines from being made has failed, and does not keep the rest from being run.
            false => match on_other_kernels(workspace, args, tally) {
                Err(error) if !error.is::<supervise::Interrupted>() => {
                    eprintln!("xtask: no virtual machines: {error:#}");
                    tally.failed += 1;
                    false
                }
                done => done?,
            },
        };
        let examples = run(&["--doc"], tally)?;
        // Last, when nothing else runs.
        let speed = chosen(args) || packets_are_as_fast(workspace, args, tally)?;
        quick && real && other && examples && speed
    };
    let skipped = skip_log.lines();
    // They ended early and well, so cargo test has counted them as passed.
    tally.passed = tally.passed.saturating_sub(skipped.len() as u64);
    tally.skipped += skipped.len() as u64;
    for line in skipped {
        println!("{line}");
    }
    Ok(success)
}

/// Whether only a part of the tests is asked for.
fn chosen(args: &[String]) -> bool {
    args.iter().any(|arg| arg != "--release")
}

/// Runs the tests in virtual machines. By themselves: a machine whose processor is emulated computes
/// all the time, and takes twice as long beside the host's tests, if those are not to wait for it.
fn on_other_kernels(workspace: &Path, args: &[String], tally: &mut Tally) -> Result<bool> {
    if let Some(obstacle) = vm::obstacle() {
        // Where a host is chosen for tests, what can't run is not proven.
        if std::env::var_os("CI").is_some() {
            bail!(obstacle);
        }
        println!("skipped: virtual machines: {obstacle}");
        tally.skipped += 1;
        return Ok(true);
    }
    println!("\nOn other kernels, in virtual machines");
    let began = Instant::now();
    let failed = tally.failed;
    let success = vm::prepared(workspace, args)?.run(vm::SIZE, |line| say(line, tally))?;
    // A test program that was killed has no result line to count.
    if !success && tally.failed == failed {
        tally.failed += 1;
    }
    println!("the virtual machines took {} s", began.elapsed().as_secs());
    Ok(success)
}

/// Compares what packets cost with what they did, which counts as one test.
fn packets_are_as_fast(workspace: &Path, args: &[String], tally: &mut Tally) -> Result<bool> {
    println!("\nWhat packets cost");
    let bench = target_folder(workspace).join(profile_folder(args)).join("bench");
    let status = supervise::run(Command::new(bench).args(["--check", "--short"]))?;
    match status.code() {
        Some(0) => tally.passed += 1,
        Some(SKIPPED) => tally.skipped += 1,
        _ => {
            tally.failed += 1;
            tally.failures.lines.push(
                "failed: packets cost more than they did (above: GROWN); if that is meant, \
                 `cargo xtask bench --check --update` and the same of the debug build say so (docs/testing.md)"
                    .to_owned(),
            );
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether arguments choose what is tested; those after `--` are the test programs'.
fn chooses(args: &[String]) -> bool {
    args.iter()
        .take_while(|arg| *arg != "--")
        .map(|arg| arg.split('=').next().unwrap_or(arg))
        .any(|arg| CHOOSING.contains(&arg))
}

fn run_tests(command: &mut Command, tally: &mut Tally) -> Result<ExitStatus> {
    let result = supervise::run_stdout(command, |line| say(line, tally));
    if result.is_err() {
        // Test programs that were killed could not take their namespaces away.
        sweep::stale_leftovers();
    }
    result
}

/// Prints a line of a test program, and counts what it says.
fn say(line: &str, tally: &mut Tally) {
    tally.add(line);
    let mut out = std::io::stdout().lock();
    // A reader that has gone away does not stop the tests.
    let _ = writeln!(out, "{line}");
}

/// A file in `target` that the tests add lines to; removed on drop.
struct SkipLog {
    path: PathBuf,
}

impl SkipLog {
    fn new(workspace: &Path) -> Self {
        let name = format!("skipped-tests.{}", std::process::id());
        Self { path: workspace.join("target").join(name) }
    }

    fn lines(&self) -> Vec<String> {
        let text = std::fs::read_to_string(&self.path).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

impl Drop for SkipLog {
    fn drop(&mut self) {
        // Without a skipped test there is none.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Checks format and lints; the programs for the kernel are built on the way.
///
/// # Errors
/// The set-up fails, a check can't be started, or the task is interrupted.
pub(crate) fn lint(workspace: &Path) -> Result<ExitCode> {
    setup::run(workspace, None)?;
    // Both are run, so that one correction takes care of all.
    let mut success = true;
    for args in [
        &["fmt", "--all", "--check"][..],
        &[
            "clippy",
            "--workspace",
            "--exclude",
            "canary-ebpf",
            "--all-targets",
            "--",
            "--deny",
            "warnings",
        ],
    ] {
        success &= supervise::run(cargo(workspace).args(args))?.success();
    }
    Ok(if success { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Builds agent and demo, and runs the demo.
///
/// # Errors
/// The set-up or the build fails, or the task is interrupted.
pub(crate) fn demo(workspace: &Path, args: &[String]) -> Result<ExitCode> {
    run_program(workspace, "demo", "debug", args)
}

/// Builds the benchmark, optimised, and runs it.
///
/// # Errors
/// The set-up or the build fails, or the task is interrupted.
pub(crate) fn bench(workspace: &Path, args: &[String]) -> Result<ExitCode> {
    if let Some(subcommand) = args.first() {
        setup::peers::ensure(subcommand)?;
    }
    run_program(workspace, "bench", "release", args)
}

/// Builds the agent and the programs of the tests, and runs the one that is called `name`.
fn run_program(workspace: &Path, name: &str, folder: &str, args: &[String]) -> Result<ExitCode> {
    setup::run(workspace, None)?;
    eprintln!("building the agent and the {name} (the first time takes a few minutes)");
    let mut build = cargo(workspace);
    build.args(["build", "--package", "canary-agent", "--package", "canary-tests", "--bins"]);
    if folder == "release" {
        build.arg("--release");
    }
    if !supervise::run(&mut build)?.success() {
        bail!("the agent and the {name} do not build");
    }
    let program = target_folder(workspace).join(folder).join(name);
    let status = supervise::run(Command::new(program).args(args));
    if status.is_err() {
        sweep::stale_leftovers();
    }
    let code = status?.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(1)))
}

pub(crate) fn target_folder(workspace: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace.join("target"), |folder| workspace.join(folder))
}

pub(crate) fn cargo(workspace: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace);
    // What the cargo that runs this task has set for this crate.
    for (name, _) in std::env::vars_os() {
        if let Some(name) = name.to_str()
            && (name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_"))
        {
            command.env_remove(name);
        }
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_and_options_of_test_programs_choose_no_target() {
        let chooses =
            |args: &[&str]| chooses(&args.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert!(!chooses(&[]));
        assert!(!chooses(&["nat_ipv6", "--", "--test", "--nocapture"]));
        assert!(chooses(&["-p", "xtask"]));
        assert!(chooses(&["--package=xtask"]));
        assert!(chooses(&["--test", "harness"]));
    }

    #[test]
    fn other_kernels_are_left_out_where_a_part_is_asked_for() {
        let chosen =
            |args: &[&str]| chosen(&args.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert!(!chosen(&[]) && !chosen(&["--release"]));
        assert!(
            chosen(&["nat_ipv6"]) && chosen(&["-p", "xtask"]) && chosen(&["--", "--nocapture"])
        );
    }

    #[test]
    fn result_lines_add_up_and_others_do_not_count() {
        let mut tally = Tally::default();
        for line in [
            "running 6 tests",
            "test a ... ok",
            "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 9 filtered out; finished in 1.00s",
        ] {
            tally.add(line);
        }
        assert_eq!(tally.to_string(), "7 passed, 3 failed, 1 skipped");
    }

    #[test]
    fn what_failed_is_said_again() {
        let long: Vec<String> = (0..100).map(|n| format!("line {n}")).collect();
        let said = [
            "test a ... ok",
            "test b::c ... FAILED",
            "",
            "failures:",
            "",
            "---- b::c stdout ----",
            "",
            "thread 'b::c' panicked at src/b.rs:1:2:",
            "left: 1",
            "",
            "---- d stdout ----",
        ];
        let end = [
            "",
            "failures:",
            "    b::c",
            "    d",
            "",
            "test result: FAILED. 1 passed; 2 failed",
            "after",
        ];
        let mut failures = Failures::default();
        for line in said.into_iter().chain(long.iter().map(String::as_str)).chain(end) {
            failures.add(line);
        }
        let first = [
            "failed: b::c",
            "    thread 'b::c' panicked at src/b.rs:1:2:",
            "    left: 1",
            "failed: d",
            "    line 0",
        ];
        assert_eq!(failures.lines[..5], first);
        assert_eq!(failures.lines.last().map(String::as_str), Some("    line 39"));
    }
}
