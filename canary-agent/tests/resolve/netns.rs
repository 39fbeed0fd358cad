//! Threads in network namespaces of their own, and `ip` in them.

use std::{
    io::Write,
    net::{IpAddr, UdpSocket},
    process::{Command, Stdio},
    sync::mpsc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use canary_agent::resolve::Update;
use nix::{errno::Errno, sched::CloneFlags};
use tokio::sync::watch;

/// Longest wait for anything; far more than any test allows itself.
const WAIT_MAX: Duration = Duration::from_secs(20);

/// An address.
pub(crate) fn ip_addr(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Runs a test in a network namespace of its own, on a runtime that never leaves it.
pub(crate) fn isolated<Body, Test>(body: Body)
where
    Body: FnOnce() -> Test + Send + 'static,
    Test: Future<Output = ()>,
{
    let test = move || {
        match nix::sched::unshare(CloneFlags::CLONE_NEWNET) {
            Ok(()) => {}
            Err(Errno::EPERM) if std::env::var_os("CI").is_none() => {
                eprintln!("skipped: network namespaces need root (CAP_SYS_ADMIN)");
                return;
            }
            Err(errno) => panic!("no network namespace can be had: {errno}"),
        }
        ip("link set lo up");
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime")
            .block_on(body());
    };
    if let Err(panic) = std::thread::spawn(test).join() {
        std::panic::resume_unwind(panic);
    }
}

/// Waits until what is published meets `condition`; says how long it took.
pub(crate) async fn until(
    updates: &mut watch::Receiver<Update>,
    what: &str,
    condition: impl FnMut(&Update) -> bool,
) -> Duration {
    let start = Instant::now();
    let met = tokio::time::timeout(WAIT_MAX, async { updates.wait_for(condition).await.is_ok() });
    match met.await {
        Ok(true) => start.elapsed(),
        Ok(false) => panic!("the resolver ended while waiting for {what}"),
        Err(_) => {
            let update = updates.borrow().clone();
            panic!("{what}: not within {WAIT_MAX:?}; last: {update:#?}");
        }
    }
}

/// `ip` in the calling thread's namespace; it must succeed.
pub(crate) fn ip(arguments: &str) {
    ip_output(arguments);
}

/// `ip` in the calling thread's namespace, and what it prints.
pub(crate) fn ip_output(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .expect("iproute2 is installed");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Many `ip` commands, one a line, in the calling thread's namespace.
pub(crate) fn ip_batch(lines: &str) {
    let mut child = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("iproute2 is installed");
    child.stdin.take().expect("a pipe").write_all(lines.as_bytes()).expect("ip reads");
    assert!(child.wait().expect("ip ends").success(), "ip -batch");
}

type Job = Box<dyn FnOnce() + Send>;

/// Another host: a thread in a namespace of its own, which carries out jobs there.
pub(crate) struct Peer {
    /// The namespace, as a path that `ip` takes.
    path: String,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    /// A host without any link but its loopback.
    pub(crate) fn new() -> Self {
        let (jobs, todo) = mpsc::channel::<Job>();
        let (started, path) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
            ip("link set lo up");
            let (process, thread) = (std::process::id(), nix::unistd::gettid());
            started.send(format!("/proc/{process}/task/{thread}/ns/net")).expect("a listener");
            for job in todo {
                job();
            }
        });
        let path = path.recv().expect("the peer starts");
        Self { path, jobs: Some(jobs), thread: Some(thread) }
    }

    /// Links `ours` in the calling thread's namespace with `theirs` here, and gives both an
    /// address in `10.0.NET.0/24` and `2001:db8:NET::/64`: 1 to us, 2 to the peer.
    pub(crate) fn connect(&self, ours: &str, theirs: &str, net: u8) {
        ip(&format!(
            "link add {ours} address 02:00:00:00:00:01 type veth \
             peer name {theirs} address 02:00:00:00:00:02"
        ));
        self.take(theirs);
        self.ip(&format!("address add 10.0.{net}.2/24 brd + dev {theirs}"));
        self.ip(&format!("address add 2001:db8:{net}::2/64 dev {theirs} nodad"));
        self.ip(&format!("link set {theirs} up"));
        ip(&format!("address add 10.0.{net}.1/24 brd + dev {ours}"));
        ip(&format!("address add 2001:db8:{net}::1/64 dev {ours} nodad"));
        ip(&format!("link set {ours} up"));
    }

    /// Moves a link of the calling thread's namespace here.
    pub(crate) fn take(&self, link: &str) {
        ip(&format!("link set {link} netns {}", self.path));
    }

    /// `ip` on the peer.
    pub(crate) fn ip(&self, arguments: &str) {
        let arguments = arguments.to_owned();
        self.run(move || ip(&arguments));
    }

    /// A datagram from the peer to the discard port of `address`.
    pub(crate) fn datagram_to(&self, address: &str) {
        let address = ip_addr(address);
        self.run(move || {
            let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any).expect("a socket");
            socket.send_to(b"x", (address, 9)).expect("sent");
        });
    }

    fn run(&self, job: impl FnOnce() + Send + 'static) {
        let (finish, done) = mpsc::channel();
        let job = Box::new(move || {
            job();
            finish.send(()).expect("a listener");
        });
        self.jobs.as_ref().expect("a live peer").send(job).expect("a live peer");
        done.recv().expect("the job succeeds");
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.jobs.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
