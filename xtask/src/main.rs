//! Set-up, demo and tests of canary-xdp: `cargo xtask COMMAND`.
//!
//! Compiled before anything else, so it depends on little, and on no other
//! crate of the workspace.

mod fuzz;
mod mutate;
mod package;
mod progress;
mod setup;
mod supervise;
// One source for both: the tests sweep before they start, this crate after it
// has ended them.
#[expect(unreachable_pub, reason = "public in the library that it is shared with")]
#[path = "../../tests/src/sweep.rs"]
mod sweep;
mod tasks;
#[cfg(test)]
mod tidy;
mod vm;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};

/// Set-up, demo and tests of canary-xdp.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Finds or installs what the kernel side, the tests and the demo need.
    Setup {
        /// Only this way to a compiler for the BPF target.
        #[arg(long, value_enum)]
        with: Option<setup::Method>,
    },
    /// Runs every test; arguments go to `cargo test`.
    Test {
        /// For `cargo test`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Checks format and lints.
    Lint,
    /// Measures what a packet costs; `--help` says more.
    #[command(disable_help_flag = true)]
    Bench {
        /// For the benchmark.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Takes rules of tracking out of the code, one after the other, and looks that their tests
    /// fail.
    Mutate(mutate::Request),
    /// Runs the targets of `fuzz/`, each for a while; needs a compiler for C++.
    Fuzz(fuzz::Request),
    /// Runs the tests, or a command, on another kernel in a virtual machine.
    Vm(vm::Request),
    /// Builds a Debian package of the agent, and tests it.
    Package(package::Request),
    /// Shows a canary release with real traffic; `--help` says more.
    #[command(disable_help_flag = true)]
    Demo {
        /// For the demo.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match supervise::install().and_then(|()| dispatch(arguments.task)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            error
                .downcast_ref::<supervise::Interrupted>()
                .map_or(ExitCode::FAILURE, |interrupted| ExitCode::from(interrupted.exit_code()))
        }
    }
}

fn dispatch(task: Task) -> Result<ExitCode> {
    let workspace = workspace()?;
    match task {
        Task::Setup { with } => {
            let toolchain = setup::run(&workspace, with)?;
            setup::clients::ensure()?;
            println!(
                "setup: ready ({}: {}, linker {})",
                toolchain.method,
                toolchain.rustc_version,
                toolchain.linker.display()
            );
            Ok(ExitCode::SUCCESS)
        }
        Task::Test { args } => tasks::test(&workspace, &args),
        Task::Lint => tasks::lint(&workspace),
        Task::Bench { args } => tasks::bench(&workspace, &args),
        Task::Mutate(request) => mutate::run(&workspace, &request),
        Task::Fuzz(request) => fuzz::run(&workspace, &request),
        Task::Vm(request) => vm::run(&workspace, &request),
        Task::Package(request) => package::run(&workspace, &request),
        Task::Demo { args } => tasks::demo(&workspace, &args),
    }
}

/// The folder that holds this crate's.
fn workspace() -> Result<PathBuf> {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest.parent().map(Path::to_path_buf).context("the workspace's folder is not known")
}
