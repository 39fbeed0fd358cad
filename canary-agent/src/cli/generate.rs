//! `completions` and `man`: what is made from the command line's definition.

use std::{fs, path::Path};

use clap::CommandFactory;

use super::{
    args::Cli,
    failure::{Failure, exit},
    print,
};

/// Prints a shell's completion script.
pub(super) fn completions(shell: clap_complete::Shell) -> Result<(), Failure> {
    let mut command = Cli::command();
    let name = command.get_name().to_owned();
    // Into memory first: clap panics when what it writes to is closed.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    print(&String::from_utf8_lossy(&script))
}

/// Prints the main manual page, or writes one for each command into `dir`.
pub(super) fn man(dir: Option<&Path>) -> Result<(), Failure> {
    let command = Cli::command();
    let Some(dir) = dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page)?;
        return print(&String::from_utf8_lossy(&page));
    };
    let failed = |error| {
        let message = format!("can't write manual pages to {}: {error}", dir.display());
        Failure::new("failed", exit::FAILED, message)
    };
    fs::create_dir_all(dir).map_err(failed)?;
    clap_mangen::generate_to(command, dir).map_err(failed)
}
