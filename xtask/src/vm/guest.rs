//! What runs in a virtual machine: its files, its first process, and what it is asked
//! to do.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::BufWriter,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use super::{cpio::Archive, modules::Module};
use crate::setup::probe;

/// Programs of the host that tests start.
const TOOLS: [&str; 2] = ["ip", "tc"];

/// Folders that are there in any case.
const FOLDERS: [&str; 8] = ["/dev", "/proc", "/sys", "/run", "/tmp", "/etc", "/home", "/var/lib"];

/// A word that no output has by chance.
pub(crate) const MARK: &str = "canary-vm-3f5c9e";

/// What is to be done in a machine. Paths in it are the host's: whatever is taken along
/// lies at the same place.
#[derive(Clone, Debug, Default)]
pub(crate) struct Job {
    /// Programs that are taken along with their libraries.
    pub(crate) programs: BTreeSet<PathBuf>,
    /// Files and folders.
    pub(crate) files: BTreeSet<PathBuf>,
    /// What is run, one after the other; one that fails does not keep the next from running.
    pub(crate) commands: Vec<Vec<String>>,
    /// Variables of their environment.
    pub(crate) env: BTreeMap<String, String>,
}

impl Job {
    /// Writes the machine's whole file system.
    ///
    /// # Errors
    /// A file can't be read, or the archive not be written.
    pub(crate) fn write(&self, to: &Path, busybox: &Path, modules: &[Module]) -> Result<()> {
        let file = File::create(to).with_context(|| format!("making {}", to.display()))?;
        let mut archive = Archive::new(BufWriter::new(file));
        for folder in FOLDERS {
            archive.folder(Path::new(folder))?;
        }
        let shell = std::fs::read(busybox).with_context(|| busybox.display().to_string())?;
        archive.bytes(Path::new("/bin/busybox"), 0o755, &shell)?;
        let mut programs = self.programs.clone();
        for tool in TOOLS {
            let found = probe::find(tool).with_context(|| format!("{tool} is missing"))?;
            programs.insert(found);
        }
        let strip = probe::find("strip");
        let stripped = to.with_extension("stripped");
        for program in &programs {
            let bytes = strip.as_deref().and_then(|strip| without_debug(strip, program, &stripped));
            match bytes {
                Some(bytes) => archive.bytes(program, 0o755, &bytes)?,
                None => archive.file(program)?,
            }
            for library in libraries(program)? {
                archive.file(&library)?;
            }
        }
        for name in applets(busybox)? {
            // The host's own `ip` can do more, wherever it lies.
            if !TOOLS.contains(&name.as_str()) {
                archive.link(&Path::new("/bin").join(&name), "busybox")?;
            }
        }
        for file in &self.files {
            archive.tree(file)?;
        }
        for module in modules {
            let path = Path::new("/modules").join(&module.name);
            archive.bytes(&path, 0o644, &module.image)?;
        }
        archive.bytes(Path::new("/init"), 0o755, self.init(modules).as_bytes())?;
        archive.finish().map(drop)
    }

    /// The script of the first process. The machine has two serial ports: the kernel
    /// speaks on the first, the commands on the second.
    fn init(&self, modules: &[Module]) -> String {
        let mut script = format!(
            "#!/bin/sh\n\
             export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/home TMPDIR=/tmp\n\
             mount -t devtmpfs dev /dev\n\
             mount -t proc proc /proc\n\
             mount -t sysfs sys /sys\n\
             chmod 1777 /tmp\n\
             stty -F /dev/ttyS1 raw -echo\n\
             exec </dev/null >/dev/ttyS1 2>&1\n\
             echo {MARK} begins $(uname -r)\n"
        );
        for Module { name, .. } in modules {
            script += &format!("insmod /modules/{name} || echo {MARK} module {name}\n");
        }
        script += "rm -rf /modules\nip link set lo up\nworst=0\n";
        for (name, value) in &self.env {
            script += &format!("export {name}={}\n", quoted(value));
        }
        for command in &self.commands {
            let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
            script += &format!("{} || worst=$?\n", words.join(" "));
        }
        script + &format!("echo {MARK} ends $worst\nreboot -f\n")
    }
}

/// A word as the shell takes it literally.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// A program without what debuggers read, which is four fifths of it, and which the machine would
/// unpack; `None` if that can't be made, as of a script.
fn without_debug(strip: &Path, program: &Path, to: &Path) -> Option<Vec<u8>> {
    let mut command = Command::new(strip);
    command.args(["--strip-debug", "-o"]).arg(to).arg(program).stderr(Stdio::null());
    let success = command.status().is_ok_and(|status| status.success());
    let bytes = std::fs::read(to).ok().filter(|_| success);
    // It lies in a folder that goes with the machine.
    let _ = std::fs::remove_file(to);
    bytes
}

/// The shared libraries of a program, the loader among them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output =
        Command::new("ldd").env("LC_ALL", "C").arg(program).output().context("running ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = text.clone() + &String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        // Those that are linked statically have none.
        if said.contains("not a dynamic executable") {
            return Ok(Vec::new());
        }
        bail!("ldd {}: {said}", program.display());
    }
    if text.contains("not found") {
        bail!("{} lacks a library:\n{text}", program.display());
    }
    Ok(loaded(&text))
}

/// The paths in the output of ldd: `NAME => PATH (ADDRESS)`, or `PATH (ADDRESS)`.
fn loaded(text: &str) -> Vec<PathBuf> {
    let paths = text.lines().filter_map(|line| {
        let line = line.split_once("=>").map_or(line, |(_, path)| path).trim();
        line.split(' ').next().filter(|path| path.starts_with('/'))
    });
    paths.map(PathBuf::from).collect()
}

/// The commands that a busybox has.
fn applets(busybox: &Path) -> Result<Vec<String>> {
    let list = probe::output(busybox, &["--list"]);
    let list = list.with_context(|| format!("{} does not run", busybox.display()))?;
    Ok(list.lines().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let paths: Vec<PathBuf> =
            ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]
                .map(PathBuf::from)
                .into();
        assert_eq!(loaded(text), paths);
        assert!(loaded("\tstatically linked\n").is_empty());
    }

    #[test]
    fn words_reach_the_command_as_they_are() {
        let job = Job {
            commands: vec![vec!["echo".to_owned(), "it's $HOME".to_owned()]],
            env: BTreeMap::from([("CI".to_owned(), "a b".to_owned())]),
            ..Job::default()
        };
        let module = Module { name: "veth".to_owned(), image: Vec::new() };
        let init = job.init(&[module]);
        assert!(init.contains("\n'echo' 'it'\\''s $HOME' || worst=$?\n"), "{init}");
        assert!(init.contains("\nexport CI='a b'\n"), "{init}");
        assert!(init.contains("insmod /modules/veth"), "{init}");
    }
}
