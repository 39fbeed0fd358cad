//! `target/ebpf-toolchain.json`: what `canary-agent/build.rs` runs.
//!
//! The build script reads the file with a type of its own; [`FORMAT`] must
//! change with the fields, there too.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// Version of the file's fields.
pub(crate) const FORMAT: u32 = 1;

/// A cargo, a compiler and a linker that together build for the BPF target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Toolchain {
    /// [`FORMAT`].
    pub(crate) format: u32,
    /// `debian` or `nightly`.
    pub(crate) method: String,
    /// The compiler's version line: a new compiler builds the object anew.
    pub(crate) rustc_version: String,
    /// Path of cargo itself, not of rustup's proxy.
    pub(crate) cargo: PathBuf,
    /// Path of `bpf-linker`.
    pub(crate) linker: PathBuf,
    /// Environment of cargo: `RUSTC` and what that compiler needs.
    pub(crate) env: BTreeMap<String, String>,
    /// Arguments after `cargo build`.
    pub(crate) args: Vec<String>,
    /// Compiler flags besides those that every build of the programs has.
    pub(crate) rustflags: Vec<String>,
}

impl Toolchain {
    /// Where the file lies in a workspace.
    pub(crate) fn path(workspace: &Path) -> PathBuf {
        workspace.join("target").join("ebpf-toolchain.json")
    }

    /// Writes the file unless it says the same already: its time decides about rebuilding.
    ///
    /// # Errors
    /// The file can't be written.
    pub(crate) fn store(&self, workspace: &Path) -> Result<()> {
        let path = Self::path(workspace);
        let text = serde_json::to_string_pretty(self)? + "\n";
        if std::fs::read_to_string(&path).is_ok_and(|present| present == text) {
            return Ok(());
        }
        let folder = workspace.join("target");
        std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let draft = folder.join(format!(".ebpf-toolchain.{}", std::process::id()));
        std::fs::write(&draft, text)
            .and_then(|()| std::fs::rename(&draft, &path))
            .with_context(|| format!("writing {}", path.display()))
    }
}

/// Removes what the cargo that runs this task has set, and what would choose
/// another compiler; registries, proxies and `CARGO_HOME` stay.
pub(crate) fn clean_env(command: &mut Command) {
    const KEEP: [&str; 4] = ["CARGO_HOME", "CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTR"];
    for (name, _) in std::env::vars_os() {
        let Some(name) = name.to_str() else { continue };
        let foreign = name.starts_with("CARGO") && !KEEP.iter().any(|keep| name.starts_with(keep))
            || name.starts_with("RUSTC")
            || name.starts_with("RUSTDOC")
            || name == "RUSTFLAGS"
            || name == "RUSTUP_TOOLCHAIN"
            || name == "LD_LIBRARY_PATH";
        if foreign {
            command.env_remove(name);
        }
    }
}
