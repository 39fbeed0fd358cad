//! Debian's compiler for its web browsers, with a `core` for the BPF target as a package.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::{Method, apt, assemble, linker, probe, recent_enough, toolchain::Toolchain};
use crate::progress::Progress;

const RUSTC: &str = "/usr/bin/rustc";
const CARGO: &str = "/usr/bin/cargo";

/// The LLVM of the compiler in the package lists that this was made with.
const LLVM_DEFAULT: u32 = 22;

const COMPILER_PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"];

/// Debian's compiler, if it is installed with its `core` for the target.
fn compiler() -> Option<probe::Compiler> {
    let compiler = probe::compiler(Path::new(RUSTC))?;
    // `/usr/bin/rustc` may be an older compiler, or rustup's proxy.
    (recent_enough(&compiler.version)
        && compiler.target_libdir.starts_with("/usr/lib")
        && probe::has_core(&compiler.target_libdir))
    .then_some(compiler)
}

/// The toolchain, if all of it works.
pub(crate) fn probe(cache: &Path) -> Option<Toolchain> {
    if !Path::new(RUSTC).is_file() || !Path::new(CARGO).is_file() {
        return None;
    }
    // The linker for the likely LLVM is tried while the compiler says which it has.
    let likely = linker::path(cache, LLVM_DEFAULT);
    let (compiler, cargo, likely_works) = std::thread::scope(|scope| {
        let cargo = scope.spawn(|| probe::output(Path::new(CARGO), &["--version"]));
        let linker = scope.spawn(|| linker::works(&likely));
        (compiler(), cargo.join().ok().flatten(), linker.join().unwrap_or(false))
    });
    let compiler = compiler?;
    cargo?;
    let linker = linker::path(cache, compiler.llvm);
    let works = if compiler.llvm == LLVM_DEFAULT { likely_works } else { linker::works(&linker) };
    works.then(|| {
        let (rustc, cargo) = (PathBuf::from(RUSTC), PathBuf::from(CARGO));
        assemble(Method::Debian, rustc, cargo, compiler, linker, &[])
    })
}

/// What has to be installed; `llvm` is that of the compiler, if it is there.
fn missing_packages() -> Vec<String> {
    let mut missing = Vec::new();
    let compiler = compiler();
    if compiler.is_none() || probe::output(Path::new(CARGO), &["--version"]).is_none() {
        missing.extend(COMPILER_PACKAGES.map(str::to_owned));
    }
    let llvm = compiler.map_or(LLVM_DEFAULT, |compiler| compiler.llvm);
    if linker::llvm_prefix(llvm).is_none() {
        missing.push(format!("llvm-{llvm}-dev"));
    }
    // The linker links against LLVM's C++ run-time library.
    if probe::find("c++").is_none() {
        missing.push("g++".to_owned());
    }
    missing
}

/// Whether nothing is missing but the linker, or apt may install it.
pub(crate) fn can_install(progress: &mut Progress) -> Result<bool> {
    let missing = missing_packages();
    if missing.is_empty() {
        return Ok(true);
    }
    if !apt::present() || !super::is_root() {
        return Ok(false);
    }
    if apt::without_candidate(&missing).is_empty() {
        return Ok(true);
    }
    apt::update(progress)?;
    Ok(apt::without_candidate(&missing).is_empty())
}

/// Installs the packages that are missing, and builds the linker.
pub(crate) fn install(cache: &Path, progress: &mut Progress) -> Result<Toolchain> {
    let missing = missing_packages();
    if !missing.is_empty() && apt::install(&missing, progress).is_err() {
        // Package lists that are out of date name files that are gone.
        apt::update(progress)?;
        apt::install(&missing, progress)?;
    }
    let Some(compiler) = compiler() else {
        bail!(
            "{RUSTC} does not work, is older than 1.{}, or lacks `core` for {}",
            super::RUST_MINOR_MIN,
            super::TARGET
        );
    };
    if linker::llvm_prefix(compiler.llvm).is_none() && super::is_root() {
        // Another LLVM than the one that was expected before the compiler was there.
        apt::install(&[format!("llvm-{}-dev", compiler.llvm)], progress)?;
    }
    linker::ensure(cache, compiler.llvm, progress)?;
    probe(cache).context("all was installed, but one of the tools does not work")
}

/// The commands that do the same by hand.
pub(crate) fn manual(cache: &Path) -> String {
    let missing = missing_packages();
    let mut text = "  # Debian's compiler".to_owned();
    if !missing.is_empty() {
        text +=
            &format!("\n  apt-get update && apt-get install {}      # as root", missing.join(" "));
    }
    let llvm = compiler().map_or(LLVM_DEFAULT, |compiler| compiler.llvm);
    text + "\n  " + &linker::manual(cache, llvm)
}
