//! `bpf-linker`, built for one version of LLVM into a cache of the user's.
//!
//! The published binaries are made for another LLVM than a host's compiler may
//! have, and a linker older than the compiler's LLVM can't read its bitcode.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::{probe, toolchain::clean_env};
use crate::{progress::Progress, supervise};

/// The version that is built.
const VERSION: &str = "0.13.0";

/// Versions of LLVM that it has a feature for.
pub(crate) const LLVM_SUPPORTED: std::ops::RangeInclusive<u32> = 21..=23;

/// Lines of a failed build that are shown.
const TAIL_LINES: usize = 30;

/// The user's cache: `$XDG_CACHE_HOME/canary-xdp`, by default under `~/.cache`.
///
/// # Errors
/// Neither variable nor home directory is known.
pub(crate) fn cache() -> Result<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        // The XDG base directory specification: relative paths are ignored.
        .filter(|path| path.is_absolute())
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))
        .context("no home directory: set XDG_CACHE_HOME to where bpf-linker may be kept")?;
    Ok(base.join("canary-xdp"))
}

fn folder(cache: &Path, llvm: u32) -> PathBuf {
    cache.join(format!("bpf-linker-{VERSION}-llvm-{llvm}"))
}

/// Where the linker for a version of LLVM lies.
pub(crate) fn path(cache: &Path, llvm: u32) -> PathBuf {
    folder(cache, llvm).join("bin").join("bpf-linker")
}

/// Whether the linker at a path runs and is the right version.
pub(crate) fn works(linker: &Path) -> bool {
    probe::output(linker, &["--version"]).is_some_and(|text| text.trim().ends_with(VERSION))
}

/// Where LLVM's libraries and headers of one major version are installed.
pub(crate) fn llvm_prefix(llvm: u32) -> Option<PathBuf> {
    let debian = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    let configs = [
        debian.join("bin").join("llvm-config"),
        probe::find(&format!("llvm-config-{llvm}")).unwrap_or_default(),
        probe::find("llvm-config").unwrap_or_default(),
    ];
    configs.iter().filter(|config| config.is_file()).find_map(|config| {
        let version = probe::output(config, &["--version"])?;
        if version.split('.').next()?.trim().parse() != Ok(llvm) {
            return None;
        }
        let prefix = PathBuf::from(probe::output(config, &["--prefix"])?.trim());
        prefix.join("include").join("llvm-c").is_dir().then_some(prefix)
    })
}

/// Holds the cache: two set-ups at once build one linker.
///
/// # Errors
/// The cache can't be made or locked.
pub(crate) fn lock(cache: &Path, progress: &mut Progress) -> Result<File> {
    fs::create_dir_all(cache).with_context(|| format!("making {}", cache.display()))?;
    let path = cache.join("lock");
    let file = File::create(&path).with_context(|| format!("opening {}", path.display()))?;
    if file.try_lock().is_err() {
        progress.step("waiting for another set-up of the same user");
        file.lock().with_context(|| format!("locking {}", path.display()))?;
    }
    Ok(file)
}

/// Builds the linker unless it works; call it with the cache locked.
///
/// # Errors
/// LLVM is missing, or the build fails: with the end of its output.
pub(crate) fn ensure(cache: &Path, llvm: u32, progress: &mut Progress) -> Result<PathBuf> {
    let linker = path(cache, llvm);
    if works(&linker) {
        return Ok(linker);
    }
    let Some(prefix) = llvm_prefix(llvm) else {
        bail!("LLVM {llvm} with its headers is missing: bpf-linker can't be built");
    };
    progress.step(&format!("building bpf-linker {VERSION} for LLVM {llvm}: about a minute, once"));
    // The folder appears whole: an interrupted build leaves no linker, and its
    // objects are used again by the next.
    let draft = cache.join("draft");
    let objects = cache.join("build");
    let log = cache.join("build.log");
    remove_folder(&draft)?;
    let mut command = install_command(&prefix, llvm, &draft, &objects);
    let mut lines = Vec::new();
    let status = supervise::run_lines(&mut command, |line| match line {
        Some(line) => {
            progress.detail(line);
            lines.push(line.to_owned());
        }
        None => progress.detail(lines.last().map_or("", String::as_str)),
    })?;
    let _ = fs::write(&log, lines.join("\n"));
    let built = draft.join("bin").join("bpf-linker");
    if !status.success() || !works(&built) {
        let tail = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n");
        bail!(
            "bpf-linker was not built ({status}); its last words, all of them in {}:\n{tail}",
            log.display()
        );
    }
    remove_folder(&folder(cache, llvm))?;
    fs::rename(&draft, folder(cache, llvm)).context("moving bpf-linker into the cache")?;
    remove_folder(&objects)?;
    progress.step("bpf-linker is built");
    Ok(linker)
}

fn install_command(prefix: &Path, llvm: u32, root: &Path, objects: &Path) -> Command {
    let libraries = prefix.join("lib");
    let cargo = std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from);
    let mut command = Command::new(&cargo);
    clean_env(&mut command);
    // The compiler that belongs to this cargo, whatever the user's default is.
    let rustc = cargo.with_file_name("rustc");
    if rustc.is_absolute() && rustc.is_file() {
        command.env("RUSTC", rustc);
    }
    command
        // Outside the workspace, whose configuration is none of the linker's business.
        .current_dir("/")
        .env("LLVM_PREFIX", prefix)
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            format!("-L\x1fnative={0}\x1f-Clink-arg=-Wl,-rpath,{0}", libraries.display()),
        )
        .env("CARGO_TARGET_DIR", objects)
        .env("CARGO_TERM_COLOR", "never")
        .args(["install", "bpf-linker", "--version", VERSION, "--locked"])
        .args(["--no-default-features", "--features"])
        .arg(format!("llvm-{llvm}"))
        .arg("--root")
        .arg(root);
    command
}

/// The commands that build the linker by hand, for those who must.
pub(crate) fn manual(cache: &Path, llvm: u32) -> String {
    let prefix = format!("/usr/lib/llvm-{llvm}");
    format!(
        "LLVM_PREFIX={prefix} RUSTFLAGS=\"-L native={prefix}/lib -C link-arg=-Wl,-rpath,{prefix}/lib\" \\\n  \
         cargo install bpf-linker --version {VERSION} --locked --no-default-features --features llvm-{llvm} \\\n  \
         --root {}",
        folder(cache, llvm).display()
    )
}

fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}
