//! Network namespaces that go away with their value.

use std::{
    fmt,
    fs::{self, File},
    io::Write as _,
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use nix::sched::{CloneFlags, setns};

use crate::{spawn::spawn, sweep::NETNS_FOLDER};

/// The next number in a name of this process.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A name that no other process and no other call has: `canary-PID-N-ROLE`.
pub(crate) fn unique_name(role: &str) -> String {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("canary-{}-{number}-{role}", std::process::id())
}

/// A network namespace, known to `ip netns` by its name, deleted on drop.
pub struct Namespace {
    name: String,
    file: Arc<File>,
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Namespace").field(&self.name).finish()
    }
}

impl Namespace {
    /// Makes a namespace with its loopback up, and IPv6 addresses that work at once.
    ///
    /// # Panics
    /// Not root, or `ip` is missing: see [`crate::host::ready`].
    #[track_caller]
    pub fn new(role: &str) -> Self {
        let name = unique_name(role);
        run_ip(&["netns", "add", &name], "");
        let path = Path::new(NETNS_FOLDER).join(&name);
        let file = File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let namespace = Self { name, file: Arc::new(file) };
        // Duplicate address detection would keep addresses tentative for a second.
        namespace.sysctl("net/ipv6/conf/all/accept_dad", "0");
        namespace.sysctl("net/ipv6/conf/default/accept_dad", "0");
        // No router will answer.
        namespace.sysctl("net/ipv6/conf/default/router_solicitations", "0");
        namespace.ip("link set lo up");
        namespace
    }

    /// Its name for `ip netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs lines of `ip` commands in it (as `ip -batch` reads them).
    ///
    /// # Panics
    /// One of them fails.
    #[track_caller]
    pub fn ip(&self, lines: &str) {
        run_ip(&["-n", &self.name, "-batch", "-"], lines);
    }

    /// Moves an interface of this process's namespace into it, under another name, and sets it up. When
    /// the namespace goes, a device goes back to where the host booted.
    ///
    /// # Panics
    /// There is no such interface, or one of that name is there.
    #[track_caller]
    pub fn take_in(&self, interface: &str, name: &str) {
        run_ip(&["link", "set", interface, "netns", &self.name, "name", name], "");
        self.ip(&format!("link set {name} up"));
    }

    /// Runs a function on a thread in the namespace; sockets that it opens stay there.
    ///
    /// # Panics
    /// With the function's panic.
    #[track_caller]
    pub fn run<T: Send>(&self, function: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    enter(&self.file);
                    function()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Starts a thread that lives in the namespace.
    ///
    /// # Panics
    /// The host has no thread left.
    pub fn spawn_thread<T: Send + 'static>(
        &self,
        name: &str,
        function: impl FnOnce() -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        let file = Arc::clone(&self.file);
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                enter(&file);
                function()
            })
            .expect("no thread")
    }

    /// A command that will run in the namespace, with this process's mounts.
    ///
    /// Unlike `ip netns exec` it mounts no new `/sys`. Start it with
    /// [`crate::spawn::spawn`].
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let file = Arc::clone(&self.file);
        let mut command = Command::new(program);
        command.stdin(Stdio::null());
        // SAFETY: setns is a plain system call; the closure allocates nothing
        // and owns the file that it uses.
        unsafe {
            command.pre_exec(move || {
                setns(file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(Into::into)
            });
        }
        command
    }

    /// What a command says that runs in it to its end.
    ///
    /// # Errors
    /// What it complains of, if it fails or is missing.
    pub fn ask(&self, words: &str) -> Result<String, String> {
        let mut words = words.split(' ');
        let mut command = self.command(words.next().unwrap_or_default());
        command.args(words).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = spawn(command).and_then(Child::wait_with_output).map_err(|e| e.to_string())?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(text(&output.stderr)),
        }
    }

    /// Sets a value under `/proc/sys` of the namespace: `net/ipv4/ip_forward`.
    ///
    /// # Panics
    /// There is no such value, or it can't be set.
    #[track_caller]
    pub fn sysctl(&self, key: &str, value: &str) {
        let path = Path::new("/proc/sys").join(key);
        self.run(|| fs::write(&path, value))
            .unwrap_or_else(|error| panic!("{} in {}: {error}", path.display(), self.name));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // A panic here would hide the one that may be under way; the next
        // process sweeps.
        let _ =
            Command::new("ip").args(["netns", "delete", &self.name]).stderr(Stdio::null()).status();
    }
}

fn enter(file: &File) {
    setns(file.as_fd(), CloneFlags::CLONE_NEWNET).expect("can't enter the namespace");
}

#[track_caller]
fn run_ip(args: &[&str], input: &str) {
    let mut child = Command::new("ip")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("ip: {error}"));
    if let Some(mut stdin) = child.stdin.take() {
        // `ip` says itself what was wrong when it stops reading.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().expect("waiting for ip");
    assert!(
        output.status.success(),
        "ip {}: {}{input}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
}
