//! One run of a virtual machine under qemu, from its start to its end.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use super::guest::MARK;
use crate::{
    progress::Progress,
    setup::{self, apt, probe},
    supervise,
};

/// The program of the package.
const QEMU: &str = "qemu-system-x86_64";
/// The package that has it.
const PACKAGE: &str = "qemu-system-x86";

/// What kernels are told.
const PARAMETERS: &str = "console=ttyS0 panic=-1 quiet random.trust_cpu=on";

/// The processor that is emulated: of one with more, the kernel uses what takes longer to emulate.
const EMULATED: &str = "Nehalem";

/// What kernels are told of such a processor. Its timer works, though not always in time for those who
/// look whether it does while the host is busy. Its counter can be relied on, which is the host's: the
/// other clocks are devices, and each look at them an exit from emulated code. Nothing can be
/// learnt from how it speculates. String instructions are slower than loops. Memory need not be
/// cleared for nobody's secrets.
const EMULATED_PARAMETERS: &str = "no_timer_check tsc=reliable clocksource=tsc mitigations=off \
                                   clearcpuid=rep_good,erms init_on_alloc=0 hardened_usercopy=off cgroup_disable=memory";

/// Lines of the kernel's console that are shown when the machine has failed.
const CONSOLE_LINES: usize = 30;

/// How large a machine is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u32,
    /// How long it may run.
    pub(crate) limit: Duration,
}

/// Why no machine can run here, if so.
pub(crate) fn obstacle() -> Option<String> {
    if probe::find(QEMU).is_some() || (apt::present() && setup::is_root()) {
        return None;
    }
    Some(format!("{QEMU} is missing: apt-get install --no-install-recommends {PACKAGE}"))
}

/// Finds qemu, or installs it.
pub(super) fn qemu() -> Result<PathBuf> {
    if let Some(found) = probe::find(QEMU) {
        return Ok(found);
    }
    if let Some(obstacle) = obstacle() {
        bail!(obstacle);
    }
    let mut progress = Progress::new();
    let packages = [PACKAGE.to_owned()];
    if !apt::without_candidate(&packages).is_empty()
        || apt::install(&packages, &mut progress).is_err()
    {
        // Package lists that are missing or out of date.
        apt::update(&mut progress)?;
        apt::install(&packages, &mut progress)?;
    }
    probe::find(QEMU).with_context(|| format!("{PACKAGE} has no {QEMU}"))
}

/// Whether KVM can run Debian's kernels: it needs the processor's own virtualisation.
/// Some clouds have a `/dev/kvm` without, which starts machines that never get on.
pub(crate) fn kvm() -> bool {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |wanted: &str| {
        let mut lines = flags.lines().filter(|line| line.starts_with("flags"));
        lines.any(|line| line.split_whitespace().any(|flag| flag == wanted))
    };
    let opens = || fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    (has("vmx") || has("svm")) && opens()
}

/// How a machine has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    /// What `uname -r` says in it.
    pub(crate) release: String,
    /// Exit code of the last command that failed, or 0.
    pub(crate) code: u8,
}

/// Boots a kernel with this file system and hands over each line of its commands' output.
///
/// # Errors
/// qemu can't be had or started, the machine does not come to its end within its limit
/// (with the end of its console), or the task is interrupted.
pub(crate) fn run(
    kernel: &Path,
    initramfs: &Path,
    size: Size,
    mut on_line: impl FnMut(&str),
) -> Result<Ended> {
    let qemu = qemu()?;
    let console = Console(initramfs.with_extension("console"));
    let mut command = Command::new(qemu);
    command
        .args(if kvm() {
            ["-accel", "kvm", "-cpu", "host"]
        } else {
            ["-accel", "tcg", "-cpu", EMULATED]
        })
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-smp", &size.cpus.to_string(), "-m", &format!("{}M", size.memory_mib)])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .arg("-append")
        .arg(format!("{PARAMETERS} {}", if kvm() { "" } else { EMULATED_PARAMETERS }))
        .args(["-serial", &format!("file:{}", console.0.display())])
        .args(["-serial", "stdio"]);
    // Two interfaces on one wire that leads nowhere else.
    for (number, id) in ["a", "b"].iter().enumerate() {
        command.args(["-netdev", &format!("hubport,hubid=0,id={id}")]).args([
            "-device",
            &format!("virtio-net-pci,netdev={id},mac=02:00:00:00:00:0{number},romfile="),
        ]);
    }
    let mut report = Report::default();
    let ran = supervise::run_stdout_within(&mut command, size.limit, |line| {
        let line = line.trim_end_matches('\r');
        match report.take(line) {
            None => on_line(line),
            Some("") => {}
            Some(before) => on_line(before),
        }
    })?;
    match (ran, report.release, report.code) {
        (Some(_), Some(release), Some(code)) => Ok(Ended { release, code }),
        (None, ..) => bail!(
            "the virtual machine has not ended within {} s; the end of its console:\n{}",
            size.limit.as_secs(),
            console.tail()
        ),
        (Some(status), ..) => bail!(
            "the virtual machine did not come to its end (qemu: {status}); the end of its console:\n{}",
            console.tail()
        ),
    }
}

/// What the first process has said of itself.
#[derive(Debug, Default)]
struct Report {
    release: Option<String>,
    code: Option<u8>,
}

impl Report {
    /// Takes a line that is meant for it, and returns what stood before that: the end
    /// of some output without a line's end.
    fn take<'a>(&mut self, line: &'a str) -> Option<&'a str> {
        let (before, said) = line.split_once(MARK)?;
        match said.trim().split_once(' ')? {
            ("begins", release) => self.release = Some(release.to_owned()),
            ("ends", code) => self.code = code.parse().ok(),
            ("module", name) => eprintln!("xtask: the module {name} was not loaded"),
            _ => return None,
        }
        Some(before)
    }
}

/// The file that the kernel's messages go to; gone with the value.
struct Console(PathBuf);

impl Console {
    fn tail(&self) -> String {
        let bytes = fs::read(&self.0).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
        lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n")
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // There is none where qemu did not start.
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_first_process_says_is_told_from_output() {
        let mut report = Report::default();
        assert_eq!(report.take(&format!("{MARK} begins 6.1.0-56-cloud-amd64")), Some(""));
        assert_eq!(report.take("test result: ok. 5 passed; 0 failed"), None);
        assert_eq!(report.code, None);
        assert_eq!(report.take(&format!("no line{MARK} ends 101")), Some("no line"));
        assert_eq!(report.release.as_deref(), Some("6.1.0-56-cloud-amd64"));
        assert_eq!(report.code, Some(101));
    }
}
