//! A Debian of its own, started by systemd as its first process, whose network is one of
//! the bench's namespaces: what a package does to a host, and what a unit's restrictions do
//! to the agent, is seen there and nowhere else.
//!
//! It is a container without a container's tools: namespaces of its own for mounts,
//! processes, host name, messages and control groups; its files are a folder that is never
//! written to, with a file system in memory above it.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    agent::Output,
    netns::{Namespace, unique_name},
    spawn, sweep, wait,
};

/// Run by the new namespaces' first process: makes the mounts, and becomes systemd.
/// Its arguments are an empty folder and the folder of the system's files.
const BOOT: &str = r#"
set -e
folder=$1 system=$2 root=$1/root
mount -t tmpfs tmpfs "$folder"
mkdir "$folder/upper" "$folder/work" "$root"
mount -t overlay overlay -o "lowerdir=$system,upperdir=$folder/upper,workdir=$folder/work" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
# As systemd mounts it on a host, and in a container does not.
mount -t bpf -o mode=700 bpf "$root/sys/fs/bpf"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty; do
    : > "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
mount -t tmpfs tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mkdir "$root/run/host"
cd "$root"
pivot_root . run/host
exec chroot . /usr/bin/env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin sh -c '
    umount -l /run/host
    rmdir /run/host
    exec /lib/systemd/systemd --log-target=journal --show-status=no'
"#;

/// What goes wrong before systemd runs.
const LOG: &str = "boot.log";

/// Commands may take so many times [`wait::patience`]: they start agents and packages.
const COMMAND_PATIENCE: u32 = 6;

/// A Debian that runs; gone on drop.
#[derive(Debug)]
pub struct Machine {
    folder: PathBuf,
    cgroup: PathBuf,
    child: Child,
    /// Its first process, as this host numbers it.
    init: Pid,
}

impl Machine {
    /// Boots the system whose files are in `system`, and waits until it is up.
    ///
    /// # Panics
    /// The host can't: no `unshare`, no control groups of version 2, no overlay.
    #[track_caller]
    pub fn boot(network: &Namespace, system: &Path) -> Self {
        let name = unique_name("machine");
        let folder = std::env::temp_dir().join(&name);
        fs::create_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let cgroup = sweep::cgroups().expect("no control groups of version 2").join(&name);
        fs::create_dir(&cgroup).unwrap_or_else(|error| panic!("{}: {error}", cgroup.display()));
        let mut command = network.command("unshare");
        command
            .args(["--mount", "--pid", "--fork", "--kill-child=KILL", "--uts", "--ipc", "--cgroup"])
            .args(["sh", "-c", BOOT, "boot"])
            .args([&folder, system])
            .stdout(Stdio::null())
            .stderr(File::create(folder.join(LOG)).expect("a file"));
        let members = File::options().write(true).open(cgroup.join("cgroup.procs"));
        let members = members.expect("a control group has a list of its processes");
        // SAFETY: one write to an open file; nothing is allocated.
        unsafe {
            // "0" is whoever writes it.
            command.pre_exec(move || (&members).write_all(b"0"));
        }
        let child = spawn::spawn(command).expect("starting unshare");
        let init = wait::until("the machine's first process", || {
            let path = format!("/proc/{0}/task/{0}/children", child.id());
            let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
            let said = || fs::read_to_string(folder.join(LOG)).unwrap_or_default();
            text.trim().parse().map(Pid::from_raw).map_err(|_| format!("{text:?}: {}", said()))
        });
        let machine = Self { folder, cgroup, child, init };
        wait::until_within(wait::patience() * COMMAND_PATIENCE, "a machine", || {
            // Before that its mounts are not made, and a command would be the host's.
            let name = fs::read_to_string(format!("/proc/{init}/comm")).unwrap_or_default();
            if name.trim() != "systemd" {
                let said = fs::read_to_string(machine.folder.join(LOG)).unwrap_or_default();
                return Err(format!("it is still {name:?}: {said}"));
            }
            let state = machine.run(&["systemctl", "is-system-running"]);
            let up = ["running", "degraded"].contains(&state.stdout.trim());
            up.then_some(()).ok_or_else(|| format!("{state:?}"))
        });
        machine
    }

    /// A command in the machine, as its root.
    pub fn command(&self, args: &[&str]) -> Command {
        let limit = (wait::patience() * COMMAND_PATIENCE).as_secs().to_string();
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init.to_string(), "--all", "--root", "--wd"]);
        command.args(["env", "--ignore-environment", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]);
        command.args(["LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"]);
        command.args(["timeout", "--kill-after", "5", &limit]).args(args).stdin(Stdio::null());
        command
    }

    /// Runs a command in the machine to its end.
    ///
    /// # Panics
    /// It can't be started.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> Output {
        let mut command = self.command(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = spawn::spawn(command)
            .and_then(Child::wait_with_output)
            .unwrap_or_else(|error| panic!("{args:?}: {error}"));
        Output {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The same for a command that must succeed: what it prints.
    ///
    /// # Panics
    /// It fails: with what it said.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        let Output { code, stdout, stderr } = self.run(args);
        assert_eq!(code, 0, "{args:?}: {stdout}{stderr}");
        stdout
    }

    /// Where a file of the machine is for this process.
    pub fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.init))
    }

    /// Writes a file of the machine.
    ///
    /// # Panics
    /// It can't be written.
    #[track_caller]
    pub fn write(&self, inside: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(inside);
        let folder = path.parent().expect("a folder");
        let written = fs::create_dir_all(folder).and_then(|()| fs::write(&path, bytes));
        written.unwrap_or_else(|error| panic!("{inside}: {error}"));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if thread::panicking() && !wait::interrupted() {
            let log = self.run(&["journalctl", "--no-pager", "--lines", "60"]);
            eprintln!("the machine's journal:\n{}{}", log.stdout, log.stderr);
        }
        // Everything in it ends with its first process.
        let _ = kill(self.init, Signal::SIGKILL);
        let _ = self.child.wait();
        let deadline = Instant::now() + wait::patience();
        // The last of them may take a moment.
        while !sweep::remove_cgroup(&self.cgroup) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        // What was mounted there was mounted for the machine alone.
        let _ = fs::remove_dir_all(&self.folder);
    }
}
