//! A table full of flows (`bench flows`): its memory, the time of a pass over it, and packets
//! meanwhile.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use canary_agent::plan::Family;
use canary_tests::{
    loaded::Loaded,
    names::Host,
    world::{Service, World},
};

use crate::packet::{figures, kinds::frame};

#[derive(clap::Args)]
pub(crate) struct Flows {
    /// Entries of the table, all of which are in use
    #[arg(long, default_value_t = 4_000_000)]
    flows: u32,
}

/// Fills the IPv4 table with half-open flows of a service whose buckets have moved, and sweeps it:
/// first while all may stay, then when all have expired.
pub(crate) fn run(options: &Flows) -> Result<()> {
    let service = Service {
        backends: vec![1, 2],
        table: "b2 was b1".to_owned(),
        buckets: 65_536,
        ..Service::default()
    };
    let steady = Service {
        vips: vec![Host::Vip(2).name()],
        backends: vec![11, 12],
        buckets: 65_536,
        ..Service::default()
    };
    let world = World { service: vec![service, steady], flows: options.flows, ..World::default() };
    let plane = world.plane(|name| anyhow::bail!("no interface {name}"))?;
    let before = available_bytes()?;
    let mut loaded = Loaded::new(&plane.plane, &world.sizes())?;
    let maps = loaded.datapath.reader().maps();
    let bytes = maps.iter().find(|map| map.name == "FLOWS_V4").map_or(0, |map| map.memory_bytes);
    println!(
        "table of {} entries: {:.1} MB by the kernel's account, {:.1} MB less available for both families",
        options.flows,
        bytes as f64 / 1e6,
        (before.saturating_sub(available_bytes()?)) as f64 / 1e6
    );
    let mut syn = frame(Family::V4, 0, Host::Vip(1), "S seq=1000")?;
    let began = Instant::now();
    for n in 0..options.flows {
        // Source address and port; the program does not look at checksums.
        syn[27..30].copy_from_slice(&n.to_be_bytes()[1..]);
        syn[34..36].copy_from_slice(&(10_000 + (n >> 16) as u16).to_be_bytes());
        ensure!(loaded.time_ns(&syn)? < u32::MAX, "a run");
    }
    println!("filled in {:?}", began.elapsed());
    let data = frame(Family::V4, 0, Host::Vip(2), "A seq=1001")?;
    let mut quiet = Vec::new();
    let (mut latest, mut last) = (Duration::ZERO, Instant::now());
    while quiet.len() < 2_000_000 {
        quiet.push(loaded.time_ns(&data)?);
        latest = latest.max(last.elapsed());
        last = Instant::now();
    }
    println!(
        "no pass under way: gross ns {:?}, the longest gap between two packets {latest:?}",
        figures(&mut quiet)
    );
    for round in ["nothing to remove", "everything to remove"] {
        if round.starts_with("every") {
            std::thread::sleep(Duration::from_secs(11));
        }
        let sweeper = loaded.datapath.sweeper()?;
        let over = Arc::new(AtomicBool::new(false));
        let pass = {
            let over = Arc::clone(&over);
            let mut sweeper = sweeper;
            std::thread::spawn(move || {
                // As the agent's thread. Where it is refused, the figures say so.
                // SAFETY: no memory is involved.
                unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) };
                let began = Instant::now();
                let swept = sweeper.pass(&[]);
                over.store(true, Ordering::Relaxed);
                (began.elapsed(), swept)
            })
        };
        let mut busy = Vec::new();
        let (mut latest, mut last) = (Duration::ZERO, Instant::now());
        while !over.load(Ordering::Relaxed) {
            busy.push(loaded.time_ns(&data)?);
            latest = latest.max(last.elapsed());
            last = Instant::now();
        }
        let (took, swept) = pass.join().map_err(|_| anyhow::anyhow!("the pass has panicked"))?;
        println!(
            "{round}: a pass took {took:?} ({:?}); {} packets meanwhile, gross ns {:?}, the longest gap between two {latest:?}",
            swept?,
            busy.len(),
            figures(&mut busy),
        );
    }
    Ok(())
}

/// `MemAvailable` of the host, bytes.
fn available_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no MemAvailable")?;
    Ok(kib.trim().parse::<u64>()? * 1024)
}
