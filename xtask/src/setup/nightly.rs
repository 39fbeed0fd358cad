//! Rustup's nightly, which builds `core` for the BPF target from its source.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::{Method, apt, assemble, linker, probe, recent_enough, toolchain::Toolchain};
use crate::{progress::Progress, supervise};

/// The nightly that is used and, where there is none, installed.
const CHANNEL: &str = "nightly";

struct Nightly {
    rustc: PathBuf,
    cargo: PathBuf,
    compiler: probe::Compiler,
    has_source: bool,
}

fn rustup() -> Option<PathBuf> {
    probe::find("rustup").or_else(|| {
        let home = std::env::var_os("CARGO_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::home_dir().map(|home| home.join(".cargo")))?;
        Some(home.join("bin").join("rustup")).filter(|path| path.is_file())
    })
}

fn installed() -> Option<Nightly> {
    let rustup = rustup()?;
    let rustc = probe::output(&rustup, &["which", "rustc", "--toolchain", CHANNEL])?;
    let rustc = PathBuf::from(rustc.trim());
    let cargo = rustc.with_file_name("cargo");
    probe::output(&cargo, &["--version"])?;
    let compiler = probe::compiler(&rustc).filter(|found| recent_enough(&found.version))?;
    let sysroot = rustc.parent()?.parent()?;
    let has_source = sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file();
    Some(Nightly { rustc, cargo, compiler, has_source })
}

/// The toolchain, if all of it works.
pub(crate) fn probe(cache: &Path) -> Option<Toolchain> {
    let nightly = installed().filter(|nightly| nightly.has_source)?;
    let linker = linker::path(cache, nightly.compiler.llvm);
    linker::works(&linker).then(|| {
        assemble(
            Method::Nightly,
            nightly.rustc,
            nightly.cargo,
            nightly.compiler,
            linker,
            &["-Zbuild-std=core"],
        )
    })
}

/// Whether this user has rustup: its toolchains are the user's own.
///
/// A nightly that is there with an LLVM that can't be had is known at once; of
/// one that is not there, only after its installation.
pub(crate) fn can_install() -> bool {
    rustup().is_some()
        && installed().is_none_or(|nightly| {
            let llvm = nightly.compiler.llvm;
            linker::LLVM_SUPPORTED.contains(&llvm)
                && (linker::llvm_prefix(llvm).is_some() || (apt::present() && super::is_root()))
        })
}

/// Installs nightly and its source, LLVM's headers, and builds the linker.
pub(crate) fn install(cache: &Path, progress: &mut Progress) -> Result<Toolchain> {
    if installed().is_none_or(|nightly| !nightly.has_source) {
        progress.step("rustup toolchain install nightly, with rust-src");
        let rustup = rustup().context("rustup is missing")?;
        let mut command = Command::new(rustup);
        super::toolchain::clean_env(&mut command);
        // An installed nightly is kept as it is: only its source is added.
        if installed().is_some() {
            command.args(["component", "add", "rust-src", "--toolchain", CHANNEL]);
        } else {
            command.args(["toolchain", "install", CHANNEL]);
            command.args(["--profile", "minimal", "--component", "rust-src"]);
        }
        let mut lines = Vec::new();
        let status = supervise::run_lines(&mut command, |line| {
            if let Some(line) = line {
                progress.detail(line);
                lines.push(line.to_owned());
            }
        })?;
        if !status.success() {
            bail!("rustup failed:\n{}", lines.join("\n"));
        }
    }
    let nightly = installed().context("nightly was installed, but does not work")?;
    let llvm = nightly.compiler.llvm;
    if !linker::LLVM_SUPPORTED.contains(&llvm) {
        bail!(
            "nightly has LLVM {llvm}, for which there is no bpf-linker yet; an older one does: \
             rustup toolchain install nightly-YYYY-MM-DD"
        );
    }
    if linker::llvm_prefix(llvm).is_none() {
        let packages = [format!("llvm-{llvm}-dev")];
        if !(apt::present() && super::is_root()) {
            bail!(
                "LLVM {llvm} with its headers is missing: install your distribution's \
                 llvm-{llvm}-dev, or that of https://apt.llvm.org"
            );
        }
        apt::install(&packages, progress)?;
    }
    linker::ensure(cache, llvm, progress)?;
    probe(cache).context("all was installed, but one of the tools does not work")
}

/// The commands that do the same by hand.
pub(crate) fn manual(cache: &Path) -> String {
    let llvm = installed().map_or(*linker::LLVM_SUPPORTED.end(), |found| found.compiler.llvm);
    format!(
        "  # rustup's nightly; LLVM's major version must be that of `rustc +nightly -vV`\n  \
         rustup toolchain install {CHANNEL} --profile minimal --component rust-src\n  \
         apt-get install llvm-{llvm}-dev      # as root; or from https://apt.llvm.org\n  {}",
        linker::manual(cache, llvm)
    )
}
