//! Whether a tool works: it is run, not only looked for.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::toolchain::clean_env;

/// A Rust compiler that works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Compiler {
    /// First line of `rustc --version`.
    pub(crate) version: String,
    /// Major version of its LLVM: the linker must have the same.
    pub(crate) llvm: u32,
    /// Where its libraries for the BPF target lie, whether or not they are installed.
    pub(crate) target_libdir: PathBuf,
}

/// What a command prints to its standard output, if it succeeds.
pub(crate) fn output(program: &Path, args: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    clean_env(&mut command);
    let output = command.args(args).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Asks a compiler what it is.
pub(crate) fn compiler(rustc: &Path) -> Option<Compiler> {
    let (version, libdir) = std::thread::scope(|scope| {
        let libdir =
            scope.spawn(|| output(rustc, &["--print", "target-libdir", "--target", super::TARGET]));
        (output(rustc, &["-vV"]), libdir.join().ok().flatten())
    });
    let version = version?;
    Some(Compiler {
        llvm: llvm_major(&version)?,
        version: version.lines().next()?.trim().to_owned(),
        target_libdir: PathBuf::from(libdir?.trim()),
    })
}

/// The major version in the `LLVM version:` line of `rustc -vV`.
fn llvm_major(verbose_version: &str) -> Option<u32> {
    verbose_version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version:"))?
        .trim()
        .split('.')
        .next()?
        .parse()
        .ok()
}

/// Whether a folder holds a compiled `core`.
pub(crate) fn has_core(libdir: &Path) -> bool {
    std::fs::read_dir(libdir).is_ok_and(|entries| {
        entries.flatten().any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with("libcore-") && name.ends_with(".rlib")
        })
    })
}

/// Where a program lies in `PATH` or in the folders of the system's tools.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llvm_major_is_read_from_a_compilers_verbose_version() {
        let text = "rustc 1.96.0 (ac68faa20 2026-05-25)\nbinary: rustc\nLLVM version: 22.1.8\n";
        assert_eq!(llvm_major(text), Some(22));
        assert_eq!(llvm_major("rustc 1.96.0\n"), None);
        assert_eq!(llvm_major("LLVM version: rc\n"), None);
    }

    #[test]
    fn a_tool_that_fails_does_not_count() {
        assert_eq!(output(Path::new("/bin/false"), &[]), None);
        assert_eq!(output(Path::new("/nonexistent"), &[]), None);
        assert_eq!(compiler(Path::new("/bin/true")), None);
    }
}
