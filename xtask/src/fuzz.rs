//! Runs the targets of `fuzz/` for a while: libFuzzer by the stable compiler, without cargo-fuzz.

use std::{
    fs,
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result};

use crate::{supervise, tasks::cargo};

/// What libFuzzer goes by: which edges of the code are taken, and what is compared with what.
const COVERAGE: [&str; 6] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// The targets.
const TARGETS: [&str; 1] = ["frames"];

/// What to run, and for how long.
#[derive(Debug, clap::Args)]
pub(crate) struct Request {
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Only this one.
    #[arg(value_parser = TARGETS)]
    target: Option<String>,
}

/// Builds the targets and runs one after the other. What is found out is kept in `fuzz/corpus`, what
/// ends a target in `fuzz/artifacts`.
pub(crate) fn run(workspace: &Path, request: &Request) -> Result<ExitCode> {
    let folder = workspace.join("fuzz");
    let target_folder = folder.join("target");
    let host = host(workspace)?;
    let status = supervise::run(
        cargo(&folder)
            .args(["build", "--release", "--bins", "--target", &host])
            .env("CARGO_TARGET_DIR", &target_folder)
            .env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\x1f")),
    )?;
    if !status.success() {
        return Ok(ExitCode::FAILURE);
    }
    for name in TARGETS {
        if request.target.as_ref().is_some_and(|only| only != name) {
            continue;
        }
        let (corpus, artifacts) = (folder.join("corpus").join(name), folder.join("artifacts"));
        for place in [&corpus, &artifacts] {
            fs::create_dir_all(place).with_context(|| place.display().to_string())?;
        }
        println!("{name}: {} s", request.seconds);
        let mut command = Command::new(target_folder.join(&host).join("release").join(name));
        command
            .arg(format!("-max_total_time={}", request.seconds))
            .arg(format!("-artifact_prefix={}/{name}-", artifacts.display()))
            .args(["-print_final_stats=1", "-max_len=4096", "-timeout=10"])
            .arg(&corpus);
        if !supervise::run(&mut command)?.success() {
            return Ok(ExitCode::FAILURE);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The target that the compiler compiles for by itself. Named, so that build scripts are not
/// compiled as the targets are.
fn host(workspace: &Path) -> Result<String> {
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    let output = rustc.current_dir(workspace).arg("-vV").output().context("running rustc")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc does not say for which host it is")?.to_owned())
}
