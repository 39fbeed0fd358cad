//! The binary `canary-agent`: the daemon and its commands.

use std::process::ExitCode;

fn main() -> ExitCode {
    canary_agent::cli::main()
}
