//! Frames at full speed, made by the kernel itself, and counted where they come out.
//!
//! A generator stays on its processor, and so does all that becomes of its frames: a veth pair has
//! its receiver polled on the processor that sends, be it a program that sends them back or the
//! kernel's forwarding. A frame that finds a queue full is lost, as on a wire; what counts is what
//! arrives.

use std::{
    os::{fd::AsFd as _, unix::thread::JoinHandleExt as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use canary_tests::{
    floor::{self, Sink},
    stream::{PORTS, Stream},
    topology::Family,
    wait,
};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use super::{
    Sample,
    hosts::{At, Hosts, Service},
    stay_on,
};
use crate::cpu::Look;

/// Frames of one system call at most, which a signal ends. Few calls: between two of them there is a
/// pause.
const CHUNK: u32 = 1 << 30;

/// So many frames come first, so that each flow's packet is not its first one.
const WARM: u64 = 12 * PORTS as u64;

pub(super) const DROP: &str = "XDP_DROP";
pub(super) const SWAP: &str = "MAC swap, XDP_TX";
pub(super) const REDIRECT: &str = "MAC addresses set, redirect";
pub(super) const FORWARDING: &str = "kernel forwarding";
pub(super) const NFTABLES: &str = "nftables, jhash + DNAT";

const DSR: Service = Service { forward: "dsr", port: 7001, behind: false };
const IPIP: Service = Service { forward: "ipip", port: 7002, behind: false };
const NAT: Service = Service { forward: "nat", port: 7003, behind: true };
const DSR_BEHIND: Service = Service { forward: "dsr", port: 7004, behind: true };

/// Ours, with their names.
pub(super) const OURS: [(&str, Service); 4] = [
    ("ours, dsr", DSR),
    ("ours, dsr to another interface", DSR_BEHIND),
    ("ours, ipip", IPIP),
    ("ours, nat to another interface", NAT),
];

/// Hosts whose ends count and drop what arrives.
pub(super) struct Wired {
    pub(super) hosts: Hosts,
    sink: Sink,
}

/// What stands between generator and counter.
pub(super) struct Subject<'a> {
    pub(super) name: &'static str,
    pub(super) family: Family,
    wired: &'a Wired,
    stream: Arc<Stream>,
}

impl Wired {
    /// Without anything in the middle yet.
    fn new() -> Result<Self> {
        let mut wired = Self { hosts: Hosts::new(), sink: Sink::new().context("the counter")? };
        for end in [At::Generator, At::Backends] {
            wired.hosts.attach(end, wired.sink.program())?;
        }
        Ok(wired)
    }
}

/// The hosts of all subjects.
pub(super) struct World {
    drop: Wired,
    swap: Wired,
    look_up: Wired,
    redirect: Wired,
    pub(super) ours: Wired,
    forwarding: Wired,
    nftables: Option<Wired>,
}

impl World {
    pub(super) fn new(with_nftables: bool) -> Result<Self> {
        let wired = || {
            wait::check();
            Wired::new()
        };
        let (mut drop, mut swap, mut look_up) = (wired()?, wired()?, wired()?);
        let (mut redirect, ours, forwarding) = (wired()?, wired()?, wired()?);
        drop.hosts.attach(At::Balancer, drop.sink.program())?;
        let program = floor::swap()?;
        swap.hosts.attach(At::Balancer, program.as_fd())?;
        let route = look_up.hosts.route(Family::V4, DSR.port);
        let frames: Vec<_> = (0..PORTS).map(|nth| route.frame(nth)).collect();
        let program = floor::swap_and_look_up(canary_agent::plan::Family::V4, &frames)?;
        look_up.hosts.attach(At::Balancer, program.as_fd())?;
        redirect.hosts.redirect()?;
        forwarding.hosts.forward();
        forwarding.hosts.poll(At::Balancer);
        let nftables = with_nftables.then(wired).transpose()?;
        if let Some(nftables) = &nftables {
            nftables.hosts.nftables(&[DSR.port])?;
            nftables.hosts.poll(At::Balancer);
        }
        Ok(Self { drop, swap, look_up, redirect, ours, forwarding, nftables })
    }

    /// All of them; our agent has to run.
    pub(super) fn subjects(&self, ports: u16) -> Result<Vec<Subject<'_>>> {
        let (v4, v6) = (Family::V4, Family::V6);
        let mut places = vec![
            (DROP, v4, &self.drop, DSR.port),
            (SWAP, v4, &self.swap, DSR.port),
            ("MAC swap after a look-up, XDP_TX", v4, &self.look_up, DSR.port),
            (REDIRECT, v4, &self.redirect, DSR.port),
        ];
        places.extend(OURS.map(|(name, service)| (name, v4, &self.ours, service.port)));
        places.push((FORWARDING, v4, &self.forwarding, DSR.port));
        places.extend(self.nftables.as_ref().map(|one| (NFTABLES, v4, one, DSR.port)));
        places.extend([
            (SWAP, v6, &self.swap, DSR.port),
            (OURS[0].0, v6, &self.ours, DSR.port),
            (FORWARDING, v6, &self.forwarding, DSR.port),
        ]);
        places.extend(self.nftables.as_ref().map(|one| (NFTABLES, v6, one, DSR.port)));
        let made = places.into_iter().map(|(name, family, wired, port)| {
            let stream = wired.hosts.stream(family, port, ports)?;
            Ok(Subject { name, family, wired, stream })
        });
        made.collect()
    }
}

/// Generators at work, which end with this.
struct Generators {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
}

/// What ends a system call in a thread: it comes in between, and does nothing.
const NUDGE: Signal = Signal::SIGUSR1;

extern "C" fn nudged(_: libc::c_int) {}

impl Generators {
    fn start(subject: &Subject<'_>, count: usize) -> Result<Self> {
        let handler =
            SigAction::new(SigHandler::Handler(nudged), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing.
        unsafe { sigaction(NUDGE, &handler) }?;
        let over = Arc::new(AtomicBool::new(false));
        let threads = (0..count).map(|cpu| {
            let over = Arc::clone(&over);
            let stream = Arc::clone(&subject.stream);
            subject.wired.hosts.generator.spawn_thread("generator", move || {
                stay_on(cpu)?;
                while !over.load(Ordering::Relaxed) && !wait::interrupted() {
                    stream.send(CHUNK).context("sending live frames (kernel 5.18)")?;
                }
                Ok(())
            })
        });
        let threads = threads.collect();
        Ok(Self { over, threads })
    }

    fn finish(&mut self) -> Result<()> {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // One that comes just before a call does not end it.
            while !thread.is_finished() {
                // SAFETY: the thread has not been joined, so that its id is its own.
                unsafe { libc::pthread_kill(thread.as_pthread_t(), NUDGE as libc::c_int) };
                std::thread::sleep(Duration::from_millis(1));
            }
            thread.join().map_err(|_| anyhow::anyhow!("a generator has panicked"))??;
        }
        Ok(())
    }

    /// Whether one has ended, which is only for an error.
    fn ended(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }
}

impl Drop for Generators {
    fn drop(&mut self) {
        // What it would say is said already.
        let _ = self.finish();
    }
}

impl Subject<'_> {
    /// Sends for a while, from so many processors.
    pub(super) fn measure(&self, generators: usize, window: Duration) -> Result<Sample> {
        let count = || self.wired.sink.count().context("reading the counter");
        let (before, sent_before) = (count()?, self.stream.sent()?);
        let mut at_work = Generators::start(self, generators)?;
        wait::until(self.name, || match count() {
            _ if at_work.ended() => Ok(()),
            Ok(now) if now - before >= WARM => Ok(()),
            Ok(now) => Err(format!("{} frames of {WARM} have arrived", now - before)),
            Err(error) => Err(error.to_string()),
        });
        let (first, began) = (count()?, Look::now()?);
        wait::pause_until(Instant::now() + window);
        let (last, ended) = (count()?, Look::now()?);
        wait::check();
        at_work.finish()?;
        let sent = self.stream.sent()? - sent_before;
        // What the last frames have woken may be a moment behind.
        let mut all = count()?;
        wait::until("the last frames", || {
            let before = std::mem::replace(&mut all, count().map_err(|e| e.to_string())?);
            (all == before).then_some(()).ok_or_else(|| "more come".to_owned())
        });
        let arrived = all - before;
        ensure!(arrived <= sent, "{}: {arrived} of {sent} frames have arrived", self.name);
        Ok(Sample::new(last - first, &ended.since(&began), sent, arrived))
    }
}
