//! A program without libraries: what has to be there to link one.

use std::{path::Path, process::Command};

use anyhow::{Result, bail};

use super::output_of;
use crate::setup::probe;

/// The target whose programs need no library.
#[cfg(target_arch = "x86_64")]
pub(super) const TARGET: &str = "x86_64-unknown-linux-musl";
/// The target whose programs need no library.
#[cfg(not(target_arch = "x86_64"))]
pub(super) const TARGET: &str = "aarch64-unknown-linux-musl";

/// Makes sure that a static program can be built.
///
/// # Errors
/// Something is missing: with the commands that install it.
pub(super) fn ready(workspace: &Path) -> Result<()> {
    let mut missing = Vec::new();
    // Rust's own library for the target.
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut ask = Command::new(rustc);
    ask.current_dir(workspace).args(["--print", "target-libdir", "--target", TARGET]);
    let folder = output_of(&mut ask)?;
    let folder = String::from_utf8_lossy(&folder).trim().to_owned();
    if !probe::has_core(Path::new(&folder)) {
        missing.push(format!("rustup target add {TARGET}"));
    }
    // SQLite and the cryptography of `https` checks are C.
    if probe::find("musl-gcc").is_none() {
        missing.push("apt-get install musl-tools      # as root".to_owned());
    }
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "a static program can't be built here yet. Run this, then `cargo xtask package --static` \
         again:\n\n  {}",
        missing.join("\n  ")
    )
}
