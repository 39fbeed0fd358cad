//! `cargo xtask setup`: finds or installs what the kernel side, the tests and the demo need.
//!
//! Two ways lead to a compiler for the BPF target on this workspace's stable
//! Rust: Debian's own compiler with its prebuilt `core` ([`debian`]), or
//! rustup's nightly which builds `core` from source ([`nightly`]). What is ready
//! is used, what can be installed is installed, and otherwise the commands are
//! printed. The result is `target/ebpf-toolchain.json` ([`toolchain`]).

pub(crate) mod apt;
pub(crate) mod clients;
mod debian;
pub(crate) mod linker;
mod nightly;
pub(crate) mod peers;
pub(crate) mod probe;
mod toolchain;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::ValueEnum;

use self::toolchain::Toolchain;
use crate::progress::Progress;

/// The programs' target: little-endian BPF, for x86-64 and aarch64 hosts.
const TARGET: &str = "bpfel-unknown-none";

/// The oldest minor version of Rust that builds the programs' dependencies.
const RUST_MINOR_MIN: u32 = 95;

/// A way to a compiler for the BPF target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Method {
    /// Debian's `rustc-web` and `libstd-rust-web-dev-bpf`.
    Debian,
    /// Rustup's nightly with `rust-src`.
    Nightly,
}

impl Method {
    const ALL: [Self; 2] = [Self::Debian, Self::Nightly];

    fn name(self) -> &'static str {
        match self {
            Self::Debian => "debian",
            Self::Nightly => "nightly",
        }
    }

    /// The toolchain, if all of it works.
    fn probe(self, cache: &Path) -> Option<Toolchain> {
        match self {
            Self::Debian => debian::probe(cache),
            Self::Nightly => nightly::probe(cache),
        }
    }

    /// Whether this host may install what is missing.
    fn can_install(self, progress: &mut Progress) -> Result<bool> {
        match self {
            Self::Debian => debian::can_install(progress),
            Self::Nightly => Ok(nightly::can_install()),
        }
    }

    fn install(self, cache: &Path, progress: &mut Progress) -> Result<Toolchain> {
        match self {
            Self::Debian => debian::install(cache, progress),
            Self::Nightly => nightly::install(cache, progress),
        }
    }

    fn manual(self, cache: &Path) -> String {
        match self {
            Self::Debian => debian::manual(cache),
            Self::Nightly => nightly::manual(cache),
        }
    }
}

/// Makes the host ready and says how in `target/ebpf-toolchain.json`.
///
/// Silent and quick when everything is there.
///
/// # Errors
/// Something is missing and may not be installed (with the commands that do
/// it), an installation fails, or the task is interrupted.
pub(crate) fn run(workspace: &Path, wanted: Option<Method>) -> Result<Toolchain> {
    let cache = linker::cache()?;
    let methods: Vec<Method> = match wanted {
        Some(method) => vec![method],
        None => Method::ALL.to_vec(),
    };
    let toolchain = match methods.iter().find_map(|method| method.probe(&cache)) {
        Some(toolchain) => toolchain,
        None => prepare(&methods, &cache)?,
    };
    toolchain.store(workspace)?;
    host_tools()?;
    Ok(toolchain)
}

fn prepare(methods: &[Method], cache: &Path) -> Result<Toolchain> {
    let mut progress = Progress::new();
    progress.step("setup: the kernel side's compiler or linker is not ready yet");
    let _lock = linker::lock(cache, &mut progress)?;
    // Another set-up may have finished while this one waited.
    if let Some(toolchain) = methods.iter().find_map(|method| method.probe(cache)) {
        return Ok(toolchain);
    }
    for method in methods {
        if method.can_install(&mut progress)? {
            let toolchain = method.install(cache, &mut progress)?;
            progress
                .step(&format!("setup: ready ({}, {})", toolchain.method, toolchain.rustc_version));
            return Ok(toolchain);
        }
    }
    progress.clear();
    let ways: Vec<String> = methods.iter().map(|method| method.manual(cache)).collect();
    bail!(
        "this host lacks what the kernel side is built with, and it may not be installed from \
         here.\nRun this, then `cargo xtask setup` again:\n\n{}",
        ways.join("\n\nor\n\n")
    )
}

/// What tests and demo run besides cargo.
fn host_tools() -> Result<()> {
    if probe::find("ip").is_some() {
        return Ok(());
    }
    let packages = ["iproute2".to_owned()];
    if apt::present() && is_root() {
        let mut progress = Progress::new();
        if !apt::without_candidate(&packages).is_empty() {
            apt::update(&mut progress)?;
        }
        return apt::install(&packages, &mut progress);
    }
    bail!("the program `ip` is missing; tests and demo need it: apt-get install iproute2")
}

/// Whether this process may install packages and make network namespaces.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Checks that a compiler is recent enough for the workspace.
fn recent_enough(version: &str) -> bool {
    version
        .strip_prefix("rustc 1.")
        .and_then(|rest| rest.split('.').next())
        .and_then(|minor| minor.parse::<u32>().ok())
        .is_some_and(|minor| minor >= RUST_MINOR_MIN)
}

/// The toolchain of a compiler and its cargo, if the linker for its LLVM works too.
fn assemble(
    method: Method,
    rustc: PathBuf,
    cargo: PathBuf,
    compiler: probe::Compiler,
    linker: PathBuf,
    args: &[&str],
) -> Toolchain {
    let mut env = std::collections::BTreeMap::new();
    env.insert("RUSTC".to_owned(), rustc.to_string_lossy().into_owned());
    if method == Method::Debian {
        // Linker and target flags of BPF are unstable options.
        env.insert("RUSTC_BOOTSTRAP".to_owned(), "1".to_owned());
    }
    Toolchain {
        format: toolchain::FORMAT,
        method: method.name().to_owned(),
        rustc_version: compiler.version,
        cargo,
        linker,
        env,
        args: args.iter().map(ToString::to_string).collect(),
        rustflags: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_and_unknown_compilers_are_refused() {
        assert!(recent_enough("rustc 1.96.0 (ac68faa20 2026-05-25)"));
        assert!(recent_enough("rustc 1.97.0-nightly (e50aa6fba 2026-05-19)"));
        assert!(!recent_enough("rustc 1.63.0"));
        assert!(!recent_enough("gcc 12"));
    }

    #[test]
    fn a_toolchain_survives_its_file() {
        let toolchain = assemble(
            Method::Debian,
            "/usr/bin/rustc".into(),
            "/usr/bin/cargo".into(),
            probe::Compiler {
                version: "rustc 1.96.0".to_owned(),
                llvm: 22,
                target_libdir: "/usr/lib".into(),
            },
            "/cache/bpf-linker".into(),
            &[],
        );
        let text = serde_json::to_string(&toolchain).unwrap();
        assert_eq!(serde_json::from_str::<Toolchain>(&text).unwrap(), toolchain);
        assert_eq!(toolchain.env["RUSTC_BOOTSTRAP"], "1");
    }
}
