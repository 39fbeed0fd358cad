//! Which splits were in force when, and which version a client's connections went to by them.

use std::{collections::HashMap, time::Instant};

use canary_agent::api::model::Explain;
use canary_tests::{agent::Agent, client, control::Control, topology::Family};

use crate::{fresh::Arrival, sound::tables, support::SHOP};

/// A split from one change of it to the next.
struct Epoch {
    /// Before this nobody had asked for it.
    from: Instant,
    /// From then on no other was in force.
    settled: Instant,
    /// By bucket, the version that owns it.
    owners: Vec<String>,
}

/// All splits of a run.
pub(super) struct Splits {
    buckets: HashMap<(Family, u32), usize>,
    epochs: Vec<Epoch>,
}

impl Splits {
    /// Begins with the split in force; asks for the bucket of each client.
    #[track_caller]
    pub(super) fn begin(agent: &Agent<'_>, clients: std::ops::Range<u32>) -> Self {
        let mut control = Control::open(&agent.socket()).expect("the socket");
        let mut buckets = HashMap::new();
        for family in Family::ALL {
            for client in clients.clone() {
                let from = family.client(client);
                let target = format!("/v1/services/{SHOP}/explain?from={from}&protocol=tcp");
                let answer = control.ask("GET", &target, b"").expect("an explanation");
                let explain: Explain = answer.json();
                buckets.insert((family, client), explain.bucket.expect("a bucket") as usize);
            }
        }
        let mut splits = Self { buckets, epochs: Vec::new() };
        splits.settled(agent, Instant::now());
        splits
    }

    /// Notes that the split is another, or the same, since a change that began at `from`.
    #[track_caller]
    pub(super) fn settled(&mut self, agent: &Agent<'_>, from: Instant) {
        let owners = owners(agent);
        if self.epochs.last().is_none_or(|last| last.owners != owners) {
            self.epochs.push(Epoch { from, settled: Instant::now(), owners });
        }
    }

    /// Asserts that the split is the one noted last.
    #[track_caller]
    pub(super) fn assert_unchanged(&self, agent: &Agent<'_>, when: &str) {
        let last = self.epochs.last().expect("an epoch");
        assert!(last.owners == owners(agent), "{when}: buckets have other owners");
    }

    /// How many different ones there were.
    pub(super) fn len(&self) -> usize {
        self.epochs.len()
    }

    /// The connections that went to a version that no split sent them to which was, or may have
    /// been, in force while they were opened.
    pub(super) fn astray(&self, arrivals: &[Arrival]) -> Vec<String> {
        let ends = self.epochs.iter().skip(1).map(|next| Some(next.settled)).chain([None]);
        let epochs: Vec<_> = self.epochs.iter().zip(ends).collect();
        let astray = arrivals.iter().filter_map(|arrival| {
            let Arrival { begun, ended, family, client, name } = arrival;
            let version = client::version_of(name.as_ref().ok()?);
            let bucket = self.buckets[&(*family, *client)];
            let first = epochs.partition_point(|(_, end)| end.is_some_and(|end| end < *begun));
            let mut during = epochs[first..].iter().take_while(|(epoch, _)| epoch.from <= *ended);
            let meant = |(epoch, _): &(&Epoch, _)| epoch.owners[bucket] == version;
            (!during.any(meant)).then(|| {
                let from = family.client(*client);
                format!("{from}, bucket {bucket}, went to {name:?} in the {first}th split")
            })
        });
        astray.collect()
    }
}

/// By bucket, the version that owns it, as the pinned maps say; both families say the same.
#[track_caller]
fn owners(agent: &Agent<'_>) -> Vec<String> {
    let tables = tables(agent);
    let [v4, v6] = Family::ALL.map(|family| {
        let place = tables.place(SHOP, family);
        let owner = |slot: u8| place.versions[usize::from(slot)].clone();
        tables.ledger(&place).iter().map(|entry| owner(entry.owner())).collect::<Vec<_>>()
    });
    assert!(v4 == v6, "the families' buckets have other owners");
    v4
}

#[test]
fn a_connection_is_astray_unless_a_split_that_may_have_been_in_force_sent_it_there() {
    use std::time::Duration;

    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let epoch = |from, settled, owner: &str| Epoch {
        from: at(from),
        settled: at(settled),
        owners: vec![owner.to_owned()],
    };
    let buckets = HashMap::from([((Family::V4, 1), 0)]);
    // Asked for at 10, in force at 20 at the latest.
    let splits = Splits { buckets, epochs: vec![epoch(0, 0, "stable"), epoch(10, 20, "v2")] };
    for (begun, ended, version, is_astray) in [
        (1, 9, "stable", false),
        (1, 9, "v2", true),
        (1, 11, "v2", false),
        (11, 12, "stable", false),
        (19, 30, "stable", false),
        (21, 30, "stable", true),
        (21, 30, "v2", false),
    ] {
        let name = Ok(format!("{version}-1"));
        let arrival =
            Arrival { begun: at(begun), ended: at(ended), family: Family::V4, client: 1, name };
        let astray = splits.astray(&[arrival]).len();
        assert_eq!(astray, usize::from(is_astray), "{version} from {begun} to {ended}");
    }
}
