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
use crate::{
    config::{self, Config, Diagnostic, Place, Severity},
    doctor,
};

/// Reads the configuration and prints what is wrong or strange about it.
pub(super) fn run(file: &Path, json: bool) -> Result<ExitCode, Failure> {
    let (diagnostics, code) = match config::load(file) {
        Ok(loaded) => {
            let mut warnings = loaded.warnings;
            warnings.extend(left_out(file, &loaded.config));
            (warnings, exit::DONE)
        }
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

/// The interfaces towards backends that `nat` needs and `agent.interfaces` lacks, where this
/// is the host that is meant.
fn left_out(file: &Path, config: &Config) -> Option<Diagnostic> {
    let check = doctor::left_out(config)?;
    Some(Diagnostic {
        severity: Severity::Warning,
        message: check.found,
        place: Place { file: file.display().to_string(), line: 1, column: 1, excerpt: None },
        help: check.remedy,
        related: Vec::new(),
    })
}
