//! The binary `canary-agent-next`: the agent of a layout that only tests have. They put it in the
//! place of `canary-agent` under traffic, and back.

use std::process::ExitCode;

fn main() -> ExitCode {
    canary_agent::cli::main()
}
