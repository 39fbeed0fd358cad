//! What happens in a sequence. An event means something in any state, if only that nothing
//! happens: so every part of a sequence is one, too.

use std::time::Duration;

use canary_agent::store::Admin;
use canary_tests::{
    model::Random,
    planned::{Shop, Version},
};

/// Connections: even numbers IPv4, odd ones IPv6; the last [`DATAGRAMS`] are UDP flows.
pub(crate) const CONNECTIONS: u8 = 32;
/// How many of them are UDP flows.
pub(crate) const DATAGRAMS: u8 = 8;
/// Backends of all versions: 1 to this number.
pub(crate) const BACKENDS: u16 = 7;
/// Backends that are always configured with a weight above 0: the first of each version.
pub(crate) const ALWAYS: [u16; 3] = [1, 4, 6];

/// One thing that happens. `c` is a connection, `n` a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The client opens it: from a port that it has not used if `fresh`, else from the same.
    Open { c: u8, fresh: bool, seq: u32 },
    /// The client sends its SYN again, not having had an answer.
    Resend { c: u8 },
    /// A copy of its SYN comes late.
    Duplicate { c: u8 },
    /// The client sends data.
    Data { c: u8, bytes: u16 },
    /// Data comes that was sent a while ago.
    Late { c: u8, bytes: u16 },
    /// The client closes.
    Fin { c: u8 },
    /// The client resets.
    Reset { c: u8 },
    /// Somebody sends a SYN in the client's name, and does not know its sequence numbers.
    ForgedSyn { c: u8, guess: u32 },
    /// Somebody sends a FIN or RST in the client's name, and does not know its sequence numbers.
    ForgedEnd { c: u8, fin: bool, guess: u32 },
    /// The backend answers (`nat`).
    Answer { c: u8 },
    /// The client sends a datagram.
    Datagram { c: u8 },
    /// Every client that has something open sends something; if `again`, those that wait for an
    /// answer to their SYN send that.
    Everybody { again: bool },
    /// Nobody sends anything.
    Idle { ms: u32 },
    /// Shares of `v2` and `v3`, percent.
    Split { v2: u8, v3: u8 },
    /// A backend fails its checks, or passes.
    Down { n: u16, down: bool },
    /// All backends of a version do.
    Fails { version: u8, down: bool },
    /// An operator takes a backend out, or back in.
    Told { n: u16, admin: Admin },
    /// A backend's next hop goes or comes.
    Reachable { n: u16, reachable: bool },
    /// A backend's next hop stops answering.
    Silent { n: u16 },
    /// A backend's weight, by a reload (`live`) or a restart.
    Weight { n: u16, weight: u32, live: bool },
    /// A backend is removed or added, likewise.
    Configured { n: u16, configured: bool, live: bool },
    /// The agent ends and starts.
    Restart,
}

/// What a sequence happens to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    /// The service as it begins.
    pub(crate) shop: Shop,
    /// Whether the flow table is too small for what is open. Then there is no UDP: what finds no
    /// room is not remembered, and a flow without a SYN can't be told from a new one.
    pub(crate) small: bool,
}

/// The kinds of worlds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `dsr`.
    Dsr,
    /// `dsr` with a flow table that is too small.
    Small,
    /// `nat`.
    Nat,
}

/// A sequence: where it happens, and what.
pub(crate) fn sequence(kind: Kind, random: &mut Random) -> (Setting, Vec<Event>) {
    let seconds = Duration::from_secs;
    let shop = Shop {
        forward: if kind == Kind::Nat { "nat" } else { "dsr" },
        stickiness: random.one_of(&["connection", "connection", "client", "subnet"]),
        existing: match (kind, random.below(6)) {
            (Kind::Dsr, 0) => "move",
            _ => "pin",
        },
        fallback: random.one_of(&["control", "control", "none"]),
        drain: random.one_of(&[Some(seconds(60)), Some(seconds(1000)), Some(seconds(1000)), None]),
        udp_idle: seconds(30),
        versions: vec![
            Version { name: "stable", backends: vec![(1, 1), (2, 1), (3, 2)] },
            Version { name: "v2", backends: vec![(4, 1), (5, 1)] },
            Version { name: "v3", backends: vec![(6, 1), (7, 3)] },
        ],
        ..Shop::default()
    };
    let length = 300 + random.below(200);
    let events = (0..length).map(|_| event(kind, random)).collect();
    (Setting { shop, small: kind == Kind::Small }, events)
}

fn event(kind: Kind, random: &mut Random) -> Event {
    let stream = random.below(u64::from(CONNECTIONS - DATAGRAMS)) as u8;
    let n = 1 + random.below(u64::from(BACKENDS)) as u16;
    let bits = random.bits() as u32;
    let bytes = 1 + (bits % 1460) as u16;
    let c = stream;
    match random.below(1000) {
        0..200 => Event::Open { c, fresh: random.below(4) > 0, seq: bits },
        200..240 => Event::Resend { c },
        240..260 => Event::Duplicate { c },
        260..480 => Event::Data { c, bytes },
        480..530 => Event::Late { c, bytes },
        530..570 => Event::Fin { c },
        570..590 => Event::Reset { c },
        590..630 => Event::ForgedSyn { c, guess: bits & 0xff_ffff },
        630..650 => Event::ForgedEnd { c, fin: bits >> 31 == 0, guess: bits & 0xff_ffff },
        650..700 if kind == Kind::Nat => Event::Answer { c },
        650..790 if kind != Kind::Small => {
            let c = CONNECTIONS - DATAGRAMS + random.below(u64::from(DATAGRAMS)) as u8;
            Event::Datagram { c }
        }
        650..790 => Event::Data { c, bytes },
        790..870 => Event::Everybody { again: bits.is_multiple_of(2) },
        870..910 => {
            let ms = [
                500, 3_000, 3_000, 7_000, 7_000, 19_000, 19_000, 45_000, 150_000, 400_000,
                1_100_000,
            ];
            Event::Idle { ms: random.one_of(&ms) }
        }
        910..940 => {
            let shares = [0, 0, 1, 5, 25, 50, 100];
            let v2 = random.one_of(&shares);
            let v3 = random.one_of(&shares).min(100 - v2);
            Event::Split { v2, v3 }
        }
        940..950 => Event::Down { n, down: random.below(2) == 0 },
        950..956 => Event::Told { n, admin: random.one_of(&Admin::ALL) },
        956..962 => Event::Fails { version: (bits % 3) as u8, down: random.below(2) == 0 },
        962..972 => Event::Reachable { n, reachable: random.below(2) > 0 },
        972..976 => Event::Silent { n },
        976..984 => Event::Weight { n, weight: random.below(4) as u32, live: random.below(2) == 0 },
        984..994 => {
            let (configured, live) = (random.below(2) == 0, random.below(2) == 0);
            Event::Configured { n, configured, live }
        }
        _ => Event::Restart,
    }
}
