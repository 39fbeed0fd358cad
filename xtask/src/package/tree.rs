//! The files of a package, put where they belong below one folder.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};

use super::{NAME, crates, fields, output_of};

/// Files that are taken as they are, with where they go.
const FILES: [(&str, &str); 6] = [
    ("packaging/canary-agent.service", "usr/lib/systemd/system/canary-agent.service"),
    ("packaging/sysusers.d/canary.conf", "usr/lib/sysusers.d/canary.conf"),
    ("packaging/tmpfiles.d/canary.conf", "usr/lib/tmpfiles.d/canary.conf"),
    ("packaging/debian/agent.toml", "etc/canary/agent.toml"),
    ("packaging/debian/lintian-overrides", "usr/share/lintian/overrides/canary-agent"),
    ("README.md", "usr/share/doc/canary-agent/README.md"),
];

/// Pages of `docs/` for those who run the agent.
const PAGES: [&str; 7] =
    ["api", "cli", "configuration", "hosts", "metrics", "operations", "packets"];

/// What is under `/etc` is the operator's: an upgrade does not overwrite what was changed.
const CONFFILES: &str = "/etc/canary/agent.toml\n";

/// Shells with the files that their completions go to.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "usr/share/bash-completion/completions/canary-agent"),
    ("fish", "usr/share/fish/vendor_completions.d/canary-agent.fish"),
    ("zsh", "usr/share/zsh/vendor-completions/_canary-agent"),
];

/// Puts all files of the package below `root`, with its control files in `DEBIAN`. Returns
/// the size of the program in bytes.
///
/// # Errors
/// A file can't be read or written, or a tool fails.
pub(super) fn fill(
    workspace: &Path,
    binary: &Path,
    root: &Path,
    release: &fields::Release,
) -> Result<u64> {
    let program = root.join("usr/bin").join(NAME);
    make_folder(&program)?;
    output_of(Command::new("strip").arg("-o").arg(&program).arg(binary))?;
    set_mode(&program, 0o755)?;
    for (from, to) in FILES {
        write(&root.join(to), read(&workspace.join(from))?.as_bytes())?;
    }
    let doc = root.join("usr/share/doc").join(NAME);
    for page in PAGES {
        let text = read(&workspace.join("docs").join(page).with_extension("md"))?;
        write(&doc.join(page).with_extension("md"), text.as_bytes())?;
    }
    write(&doc.join("crates.txt"), crates::list(workspace)?.as_bytes())?;
    write(&doc.join("copyright"), copyright(workspace)?.as_bytes())?;
    let changelog = doc.join("changelog.Debian");
    write(&changelog, read(&workspace.join("packaging/debian/changelog"))?.as_bytes())?;
    compress(&changelog)?;
    for (shell, to) in COMPLETIONS {
        let script = output_of(Command::new(binary).args(["completions", shell]))?;
        write(&root.join(to), &script)?;
    }
    let manual = root.join("usr/share/man/man1");
    output_of(Command::new(binary).args(["man", "--dir"]).arg(&manual))?;
    for page in files(&manual)? {
        compress(&page)?;
    }
    control_files(workspace, binary, root, release)?;
    let bytes = fs::metadata(&program).with_context(|| program.display().to_string())?.len();
    settle(root, release.epoch)?;
    Ok(bytes)
}

/// Fills the folder `DEBIAN`; all other files are there.
fn control_files(
    workspace: &Path,
    binary: &Path,
    root: &Path,
    release: &fields::Release,
) -> Result<()> {
    let packaging = workspace.join("packaging/debian");
    let debian = root.join("DEBIAN");
    let mut sums = String::new();
    let mut size_bytes = 0;
    let mut all = files(root)?;
    all.sort();
    for path in all {
        size_bytes += fs::metadata(&path).with_context(|| path.display().to_string())?.len();
        let name = path.strip_prefix(root).unwrap_or(&path);
        let mut command = Command::new("md5sum");
        let line = output_of(command.current_dir(root).arg(name))?;
        // Conffiles may be changed.
        if !CONFFILES.contains(&*name.to_string_lossy()) {
            sums += &String::from_utf8_lossy(&line);
        }
    }
    write(&debian.join("md5sums"), sums.as_bytes())?;
    write(&debian.join("conffiles"), CONFFILES.as_bytes())?;
    let control = fields::control(
        &read(&packaging.join("control"))?,
        release,
        &fields::libraries(binary)?,
        size_bytes.div_ceil(1024),
        fields::maintainer().as_deref(),
    )?;
    write(&debian.join("control"), control.as_bytes())?;
    for script in ["postinst", "prerm", "postrm"] {
        let path = debian.join(script);
        write(&path, read(&packaging.join(script))?.as_bytes())?;
        set_mode(&path, 0o755)?;
    }
    Ok(())
}

/// The text of `packaging/debian/copyright`, with the licence that Debian has no file of.
fn copyright(workspace: &Path) -> Result<String> {
    let licence = read(&workspace.join("LICENSE-MIT"))?;
    let indented: Vec<String> = licence
        .trim()
        .lines()
        .map(|line| if line.is_empty() { " .".to_owned() } else { format!(" {line}") })
        .collect();
    let text = read(&workspace.join("packaging/debian/copyright"))?;
    Ok(text.replace("@MIT@", &indented.join("\n")))
}

/// All files below a folder.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            found.push(path);
        }
    }
    Ok(found)
}

/// Gives every folder the mode that all folders have, whatever this user's mask, and all
/// files one time.
fn settle(root: &Path, epoch: u64) -> Result<()> {
    let time = UNIX_EPOCH + Duration::from_secs(epoch);
    for path in files(root)? {
        let set = fs::File::options().write(true).open(&path).and_then(|f| f.set_modified(time));
        set.with_context(|| format!("dating {}", path.display()))?;
        for folder in path.ancestors().skip(1).take_while(|folder| folder.starts_with(root)) {
            set_mode(folder, 0o755)?;
        }
    }
    Ok(())
}

fn compress(path: &Path) -> Result<()> {
    // Without name and time of the file, so that two builds make the same.
    output_of(Command::new("gzip").args(["--best", "--no-name"]).arg(path)).map(drop)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

fn make_folder(of: &Path) -> Result<()> {
    let folder = of.parent().context("a file lies in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    make_folder(path)?;
    fs::write(path, bytes).with_context(|| format!("writing {}", path.display()))?;
    set_mode(path, 0o644)
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    let set = fs::set_permissions(path, fs::Permissions::from_mode(mode));
    set.with_context(|| format!("setting the mode of {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workspace() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
    }

    #[test]
    fn the_copyright_has_the_whole_licence() {
        let text = copyright(&workspace()).unwrap();
        assert!(text.contains("Permission is hereby granted") && !text.contains('@'), "{text}");
    }

    #[test]
    fn every_page_for_operators_is_there() {
        let pages = PAGES.iter().map(|page| format!("docs/{page}.md"));
        let files = FILES.iter().map(|(from, _)| (*from).to_owned());
        for name in pages.chain(files) {
            assert!(workspace().join(&name).is_file(), "{name}");
        }
    }
}
