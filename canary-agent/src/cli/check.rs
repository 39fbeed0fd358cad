//! `check`: what the configuration has to say.

use std::{
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

use super::{
    failure::{Failure, exit},
    print,
};
use crate::config;

/// Reads the configuration and prints what is wrong or strange about it.
pub(super) fn run(file: &Path, json: bool) -> Result<ExitCode, Failure> {
    let (diagnostics, code) = match config::load(file) {
        Ok(loaded) => (loaded.warnings, exit::DONE),
        Err(diagnostics) => (diagnostics, exit::BAD_CONFIG),
    };
    if json {
        let list = serde_json::to_string(&diagnostics).map_err(|error| {
            Failure::new("failed", exit::FAILED, format!("can't write JSON: {error}"))
        })?;
        print(&format!("{list}\n"))?;
    } else {
        if !diagnostics.is_empty() {
            let text = config::render(&diagnostics);
            // Like all complaints; whoever does not read them gets the exit code.
            let _ = io::stderr().write_all(text.as_bytes());
        }
        if code == exit::DONE {
            print(&format!("{}: ok\n", file.display()))?;
        }
    }
    Ok(ExitCode::from(code))
}
