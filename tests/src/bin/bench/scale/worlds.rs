//! Programs with so many services, clients, backends or networks, and the packets that they get.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail, ensure};
use canary_agent::plan::Family;
use canary_tests::{
    loaded::{Loaded, Sizes, XDP_TX},
    model::Random,
    names::Host,
    world::{Service, World},
};

use crate::{
    audiences,
    packet::kinds::{frame, syn_ack},
};

/// Clients of the services with routes.
const CLIENTS: usize = 10_000;

/// Services and who comes to them: the client of each number, with one connection, to the service of that number,
/// begun again where there are fewer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crowd {
    /// `dsr` or `nat`.
    pub(super) mode: &'static str,
    pub(super) services: usize,
    pub(super) clients: usize,
    /// Of each service.
    pub(super) backends: usize,
    /// Of each service.
    pub(super) buckets: u32,
}

/// A loaded program, and packets that it sends on.
pub(super) struct Subject {
    pub(super) loaded: Loaded,
    pub(super) stream: Stream,
}

/// Packets by number.
pub(super) struct Stream {
    frame: Vec<u8>,
    who: Who,
}

enum Who {
    /// The clients of a [`Crowd`].
    Crowd { family: Family, clients: usize, services: usize },
    /// Clients of the first service.
    These(Vec<IpAddr>),
}

impl Stream {
    /// How many there are.
    pub(super) fn len(&self) -> usize {
        match &self.who {
            Who::Crowd { clients, .. } => *clients,
            Who::These(clients) => clients.len(),
        }
    }

    /// The packet of a number below [`Stream::len`].
    pub(super) fn packet(&mut self, nth: usize) -> &[u8] {
        match &self.who {
            Who::Crowd { family, services, .. } => {
                address(&mut self.frame, *family, nth, nth % services);
            }
            Who::These(clients) => audiences::write_client(&mut self.frame, clients[nth]),
        }
        &self.frame
    }

    /// All packets, of any number, in an order in which none is near the one before.
    pub(super) fn scattered(&mut self, nth: usize) -> &[u8] {
        /// A prime, so that no number of packets that there are divides it.
        const STRIDE: u64 = 2_654_435_761;
        let at = (nth as u64).wrapping_mul(STRIDE) % self.len() as u64;
        self.packet(at as usize)
    }
}

/// Makes a frame that of a client's to a service.
fn address(frame: &mut [u8], family: Family, client: usize, service: usize) {
    let client = match family {
        Family::V4 => IpAddr::from(Ipv4Addr::from(0x0b00_0001 + client as u32)),
        Family::V6 => IpAddr::from(Ipv6Addr::from(0xfd00_0009_u128 << 96 | (client as u128 + 1))),
    };
    audiences::write_client(frame, client);
    match vip(family, service) {
        IpAddr::V4(vip) => frame[30..34].copy_from_slice(&vip.octets()),
        IpAddr::V6(vip) => frame[38..54].copy_from_slice(&vip.octets()),
    }
}

fn vip(family: Family, service: usize) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from(0x0a64_0000 + service as u32).into(),
        Family::V6 => Ipv6Addr::from(0xfd00_0100_u128 << 96 | service as u128).into(),
    }
}

impl Crowd {
    /// Loads the program with these services, and opens the flows that it has to know.
    pub(super) fn subject(&self, family: Family) -> Result<Subject> {
        let Self { mode, services, clients, backends, buckets } = *self;
        let translated = mode == "nat";
        let service = |nth: usize| Service {
            ports: vec!["tcp/80".to_owned()],
            mode: mode.to_owned(),
            backends: (0..backends).map(|n| (nth * backends + n + 1) as u16).collect(),
            buckets,
            ..Service::default()
        };
        let world = World {
            service: (0..services).map(service).collect(),
            // Two entries for a translated flow.
            flows: if translated { clients as u32 * 2 + 1024 } else { 1024 },
            nat_ports: (10_000, 59_999),
            arrival_sends: false,
        };
        let mut plane = world.plane(|name| bail!("no interface {name}"))?.plane;
        for (nth, plan) in plane.services.iter_mut().enumerate() {
            let plan = Arc::make_mut(plan);
            plan.vips = vec![vip(plan.family, nth / 2)];
        }
        let sizes = Sizes {
            services: (services as u32).max(16),
            vips: (services as u32 * 2).max(16),
            backends: (plane.backends.len() as u32).max(16),
            ..world.sizes()
        };
        let mut loaded = Loaded::new(&plane, &sizes)?;
        let frame = frame(family, 0, Host::Vip(1), "A seq=1001 ack=5001")?;
        let stream = Stream { frame, who: Who::Crowd { family, clients, services } };
        if translated {
            self.open(&mut loaded, family)?;
        }
        Ok(Subject { loaded, stream })
    }

    /// Has each client open its connection.
    fn open(&self, loaded: &mut Loaded, family: Family) -> Result<()> {
        let mut syn = frame(family, 0, Host::Vip(1), "S seq=1000")?;
        let mut data = frame(family, 0, Host::Vip(1), "A seq=1001 ack=5001")?;
        for client in 0..self.clients {
            for frame in [&mut syn, &mut data] {
                address(frame, family, client, client % self.services);
            }
            let there = loaded.run(&syn)?;
            ensure!(there.action == XDP_TX, "flow {client} is refused: {}", there.action);
            let answer = loaded.run(&syn_ack(&there.frame, family))?;
            ensure!(answer.action == XDP_TX, "the answer to flow {client} is refused");
            ensure!(loaded.run(&data)?.action == XDP_TX, "flow {client} is not known");
        }
        Ok(())
    }
}

/// The program with a service that has a route for so many networks, and packets of clients outside of their
/// blocks, and if there are any in them and beside them.
pub(super) fn routed(
    family: Family,
    count: usize,
) -> Result<(Loaded, Vec<(&'static str, Stream)>)> {
    let mut random = Random::new(7);
    let networks: Vec<_> = (0..count).map(|_| audiences::network(&mut random, family)).collect();
    let config = match count {
        0 => audiences::shop(false)?,
        _ => audiences::with(&audiences::shop(true)?, &networks),
    };
    let mut planner = audiences::begun(&config)?;
    planner.step(1_000_000);
    let sizes = Sizes { flows: 1024, buckets: 1 << 19, ..Sizes::default() };
    let loaded = Loaded::new(planner.plane(), &sizes)?;
    let taken = match count {
        0 => HashSet::new(),
        _ => audiences::blocks(&networks),
    };
    let outside = (0..CLIENTS).map(|_| audiences::stranger(&mut random, family, &taken)).collect();
    let mut clients = vec![("dsr, block of nobody", outside)];
    if count > 0 {
        let [inside, beside] =
            audiences::members_and_others(&mut random, &planner, &networks, CLIENTS);
        clients.extend([("dsr, in a network", inside), ("dsr, beside one", beside)]);
    }
    let stream = |(what, clients): (&'static str, Vec<IpAddr>)| {
        ensure!(!clients.is_empty(), "{what}: nobody");
        let frame = frame(family, 0, Host::Vip(1), "A").context("a frame")?;
        Ok((what, Stream { frame, who: Who::These(clients) }))
    };
    Ok((loaded, clients.into_iter().map(stream).collect::<Result<_>>()?))
}
