//! Runs the targets of `fuzz/` for a while: libFuzzer by the stable compiler, without cargo-fuzz.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
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
const TARGETS: [&str; 4] = ["frames", "config", "requests", "files"];

/// The longest word of the seeds that is tried elsewhere; a longer one is a text of its own.
const LONGEST_WORD: usize = 24;

/// What to run, and for how long.
#[derive(Debug, clap::Args)]
pub(crate) struct Request {
    /// Seconds for each target; 0 only runs what is in the corpus and the seeds.
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
            .args(["build", "--release", "--locked", "--bins", "--target", &host])
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
        let mut seeds = vec![folder.join("seeds").join(name)];
        seeds.retain(|place| place.is_dir());
        if name == "config" {
            seeds.push(examples(workspace, &target_folder)?);
        }
        println!("{name}: {} s", request.seconds);
        let mut command = Command::new(target_folder.join(&host).join("release").join(name));
        match request.seconds {
            0 => command.arg("-runs=0"),
            seconds => command.arg(format!("-max_total_time={seconds}")),
        };
        command.arg(format!("-artifact_prefix={}/{name}-", artifacts.display())).args([
            "-print_final_stats=1",
            "-max_len=4096",
            "-timeout=10",
            "-rss_limit_mb=1024",
        ]);
        if !seeds.is_empty() {
            let words = target_folder.join(format!("{name}.dict"));
            fs::write(&words, dictionary(&seeds)?).with_context(|| words.display().to_string())?;
            command.arg(format!("-dict={}", words.display()));
        }
        if !supervise::run(command.arg(&corpus).args(&seeds))?.success() {
            return Ok(ExitCode::FAILURE);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Puts each example of a configuration that is in the documents into a file of its own.
fn examples(workspace: &Path, target_folder: &Path) -> Result<PathBuf> {
    let folder = target_folder.join("examples");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let mut documents = files(&workspace.join("docs"))?;
    documents.push(workspace.join("README.md"));
    for path in documents.iter().filter(|path| path.extension().is_some_and(|end| end == "md")) {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        for (rest, number) in text.split("```toml\n").skip(1).zip(1..) {
            let example = rest.split("```").next().unwrap_or_default();
            let to = folder.join(format!("{name}-{number}.toml"));
            fs::write(&to, example).with_context(|| to.display().to_string())?;
        }
    }
    Ok(folder)
}

/// The words of all files, as libFuzzer reads them: it sees numbers being compared, but not texts.
fn dictionary(folders: &[PathBuf]) -> Result<String> {
    let mut words = BTreeSet::new();
    for folder in folders {
        for path in files(folder)? {
            let Ok(text) = fs::read_to_string(&path) else { continue };
            let parts = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '-');
            let fit = parts.filter(|word| (3..=LONGEST_WORD).contains(&word.len()));
            words.extend(fit.map(str::to_owned));
        }
    }
    Ok(words.into_iter().map(|word| format!("\"{word}\"\n")).collect())
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut paths =
        entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, std::io::Error>>()?;
    paths.sort();
    Ok(paths)
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
