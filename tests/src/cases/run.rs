//! Running a case, and saying all that went wrong.

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt::Write as _,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use canary_ebpf_common::{
    abi::{BackendCounters, Reason},
    entry::BackendIndex,
};
use nix::time::{ClockId, clock_gettime};

use super::{
    Case,
    trace::{self, Gains, Kind, Verdict, range},
};
use crate::{
    loaded::{Loaded, Outcome, Sizes, XDP_ABORTED, XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX},
    names::Host,
    notation::{Bound, Context, decode, frame, hex_difference},
    wait,
    world::{Plane, World},
};

/// The longest silence that a case needs to have been possible. Longer ones prove nothing by their
/// length.
const LONGEST_AGE: Duration = Duration::from_secs(310);

/// A place to run cases in: a network namespace of this thread's, with a second
/// interface, `lan`.
pub struct Stage {
    interfaces: HashMap<String, u32>,
    /// A program for each size of maps, used one case after the other: on an emulated processor
    /// the verifier takes longer than all else.
    loaded: HashMap<Sizes, Loaded>,
}

impl Stage {
    /// Moves this thread into a network namespace of its own.
    ///
    /// # Errors
    /// Without root, or without the means to make interfaces.
    pub fn enter() -> Result<Self> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
            .context("a network namespace needs root")?;
        let made = std::process::Command::new("ip")
            .args(["link", "add", "lan", "type", "veth", "peer", "name", "lan-peer"])
            .status()
            .context("running ip(8)")?;
        ensure!(made.success(), "ip(8) made no veth pair");
        let lan = nix::net::if_::if_nametoindex("lan")?;
        let interfaces = HashMap::from([("lan".to_owned(), lan)]);
        Ok(Self { interfaces, loaded: HashMap::new() })
    }

    /// Runs a case. Returns what went wrong, in words; nothing if all is well.
    pub fn run(&mut self, case: &Case, world: &World) -> Vec<String> {
        let mut failures = Vec::new();
        if let Err(e) = self.try_run(case, world, &mut failures) {
            failures.push(format!("{e:#}"));
        }
        match &case.fails {
            None => failures,
            Some(needle) if failures.iter().any(|f| f.contains(needle)) => Vec::new(),
            Some(needle) => {
                vec![format!("should fail with `{needle}`, but said: {}", failures.join("\n"))]
            }
        }
    }

    fn try_run(&mut self, case: &Case, world: &World, failures: &mut Vec<String>) -> Result<()> {
        let steps = trace::parse(&case.steps)?;
        ensure!(!steps.is_empty(), "nothing happens");
        let mut world = world.clone();
        let Self { interfaces, loaded } = self;
        let ifindex = |name: &str| {
            interfaces.get(name).copied().with_context(|| format!("no interface `{name}`"))
        };
        let plane = world.plane(ifindex)?;
        let loaded = match loaded.entry(world.sizes()) {
            Entry::Occupied(before) => {
                let loaded = before.into_mut();
                loaded.renew(&plane.plane)?;
                loaded
            }
            Entry::Vacant(first) => first.insert(Loaded::new(&plane.plane, &world.sizes())?),
        };
        // Before the first packet: what is waited for in between is silence, too.
        let silences = steps.iter().filter_map(|step| match step.kind {
            Kind::Silence(time) if time <= LONGEST_AGE => Some(time),
            _ => None,
        });
        silences.max().into_iter().for_each(wait_for_age);
        let mut running = Running { loaded, plane, bound: Bound::default() };
        for step in steps {
            let result = match step.kind {
                Kind::Packet { interface, input, verdict, counted } => {
                    let from = interface.map(|name| ifindex(&name)).transpose();
                    from.and_then(|from| running.packet(from, &input, &verdict, &counted))
                }
                Kind::Silence(time) => running.loaded.silence(time),
                Kind::Check(text) => running.check(&text),
                Kind::Table(text) => {
                    world.service.iter_mut().for_each(|s| s.table.clone_from(&text));
                    running.change(&world, ifindex)
                }
                Kind::Backend { name, condition } => {
                    condition_of(&mut world, &name, &condition);
                    running.change(&world, ifindex)
                }
            };
            if let Err(e) = result {
                let text = case.steps.lines().nth(step.line - 1).unwrap_or_default();
                failures.push(format!("line {}: {text}\n{e:#}", step.line));
            }
        }
        Ok(())
    }
}

/// On a host that has run for less than `time` no flow can have been silent for so long: waits
/// for it to be old enough.
fn wait_for_age(time: Duration) {
    let old_enough = time + Duration::from_secs(2);
    let age = || match clock_gettime(ClockId::CLOCK_MONOTONIC) {
        Ok(now) if Duration::from(now) > old_enough => Ok(()),
        Ok(now) => Err(format!("it has run for {:?}", Duration::from(now))),
        Err(error) => Err(error.to_string()),
    };
    wait::until_within(LONGEST_AGE, "the host's age", age);
}

/// Brings a backend of the world into a condition, and out of all others.
fn condition_of(world: &mut World, name: &str, condition: &str) {
    for service in &mut world.service {
        for (word, names) in [
            ("down", &mut service.down),
            ("maint", &mut service.maint),
            ("unreachable", &mut service.unreachable),
        ] {
            names.retain(|n| n != name);
            if word == condition {
                names.push(name.to_owned());
            }
        }
    }
}

/// A case under way.
struct Running<'a> {
    loaded: &'a mut Loaded,
    plane: Plane,
    bound: Bound,
}

impl Running<'_> {
    fn change(&mut self, world: &World, ifindex: impl Fn(&str) -> Result<u32>) -> Result<()> {
        self.plane = world.plane(ifindex)?;
        self.loaded.apply(&self.plane.plane)?;
        Ok(())
    }

    fn packet(
        &mut self,
        ifindex: Option<u32>,
        input: &str,
        verdict: &Verdict,
        counted: &str,
    ) -> Result<()> {
        let mut context = Context { bound: &mut self.bound, input: None, seen: None };
        let input = frame(input, &mut context)?;
        let before = self.counters()?;
        let seen = self.loaded.run_from(&input, ifindex)?;
        let after = self.counters()?;
        let mut wrong = String::new();
        if let Err(e) = self.judge(&input, &seen, verdict) {
            _ = writeln!(wrong, "{e:#}");
        }
        let expected = trace::gains(counted, input.len(), |name| {
            let host = match name.strip_prefix('$') {
                Some(name) => self.bound.hosts.get(name).copied(),
                None => Host::named(name),
            };
            host.map(Host::name).with_context(|| format!("`{name}` stands for nobody"))
        })?;
        let gained: Gains = after
            .iter()
            .map(|(name, n)| (name.clone(), n - before.get(name).copied().unwrap_or(0)))
            .filter(|(_, n)| *n != 0)
            .collect();
        for name in expected.keys().chain(gained.keys().filter(|n| !expected.contains_key(*n))) {
            let [e, g] = [&expected, &gained].map(|m| m.get(name).copied().unwrap_or(0));
            if e != g {
                _ = writeln!(wrong, "  counted: {name} should gain {e} and gained {g}");
            }
        }
        ensure!(wrong.is_empty(), "{}", wrong.trim_end());
        Ok(())
    }

    /// Whether the right thing became of a packet.
    fn judge(&mut self, input: &[u8], seen: &Outcome, verdict: &Verdict) -> Result<()> {
        let (action, output) = match verdict {
            Verdict::Pass => (XDP_PASS, Some("same")),
            Verdict::Drop => (XDP_DROP, None),
            Verdict::Tx(output) => (XDP_TX, Some(output.as_str())),
            Verdict::Redirect(output) => (XDP_REDIRECT, Some(output.as_str())),
        };
        ensure!(
            action == seen.action,
            "  action: should be {} and was {}\n  in:   {}\n  out:  {}",
            name(action),
            name(seen.action),
            decode(input),
            decode(&seen.frame)
        );
        let Some(output) = output else { return Ok(()) };
        let mut context =
            Context { bound: &mut self.bound, input: Some(input), seen: Some(&seen.frame) };
        let expected = frame(output, &mut context)
            .with_context(|| format!("  seen: {}", decode(&seen.frame)))?;
        if expected != seen.frame {
            bail!(
                "  frame differs\n  expected: {}\n  seen:     {}\n{}",
                decode(&expected),
                decode(&seen.frame),
                hex_difference(&expected, &seen.frame).trim_end()
            );
        }
        Ok(())
    }

    /// Every counter that is not zero, by name.
    fn counters(&self) -> Result<Gains> {
        let mut all = Gains::new();
        for (reason, n) in Reason::ALL.iter().zip(self.loaded.reasons()) {
            all.insert(reason.name().to_owned(), n as i64);
        }
        let mut backends = self.plane.backends.clone();
        // Nobody's: what is counted there is counted wrongly.
        backends.push((0, vec![BackendIndex::NONE]));
        for (n, indices) in backends {
            let host = Host::Backend(n).name();
            for one in self.loaded.counters(&indices) {
                let BackendCounters {
                    packets,
                    bytes,
                    connections,
                    returned_packets,
                    returned_bytes,
                    no_port: _,
                    exhausted_ns: _,
                } = one;
                for (counter, n) in [
                    ("packets", packets),
                    ("bytes", bytes),
                    ("connections", connections),
                    ("returned_packets", returned_packets),
                    ("returned_bytes", returned_bytes),
                ] {
                    *all.entry(format!("{host} {counter}")).or_default() += n as i64;
                }
            }
        }
        let [v4, v6] = self.loaded.datapath.reader().flow_entries()?;
        all.insert("flows".to_owned(), (v4 + v6) as i64);
        Ok(all)
    }

    /// Whether something holds of placeholders.
    fn check(&self, text: &str) -> Result<()> {
        let value = |word: &str| -> Result<String> {
            let Some(name) = word.strip_prefix('$') else { return Ok(word.to_owned()) };
            let port = self.bound.ports.get(name).map(ToString::to_string);
            let label = || self.bound.labels.get(name).map(ToString::to_string);
            port.or_else(label)
                .or_else(|| self.bound.hosts.get(name).map(|h| h.name()))
                .with_context(|| format!("{word} stands for nothing"))
        };
        let words: Vec<_> = text.split_whitespace().collect();
        let [a, op, b] = words[..] else { bail!("a check is `A == B`, `A != B` or `A in B`") };
        let (left, right) = (value(a)?, value(b)?);
        let holds = match op {
            "==" => left == right,
            "!=" => left != right,
            "in" => range(&right)?.contains(&left.parse()?),
            _ => bail!("`{op}` compares nothing"),
        };
        ensure!(holds, "  does not hold: {a} is {left}, {b} is {right}");
        Ok(())
    }
}

/// The name of an XDP action.
fn name(action: u32) -> &'static str {
    match action {
        XDP_ABORTED => "aborted",
        XDP_DROP => "drop",
        XDP_PASS => "pass",
        XDP_TX => "tx",
        XDP_REDIRECT => "redirect",
        _ => "no action",
    }
}
