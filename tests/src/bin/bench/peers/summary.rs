//! From the figures of rounds to one row for each subject, and what is aimed at.

use serde::Serialize;

use super::{
    super::packet::median,
    subjects::{ONE_IN, Subject},
};

/// What was measured of a subject in one round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Turn {
    pub(super) connections_per_second: f64,
    /// For each second that the benchmark's own processes and the kernel's ran.
    pub(super) connections_per_own_second: f64,
    pub(super) requests_per_second: f64,
    pub(super) requests_p99_us: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) p999_us: f64,
    /// For a thousand connections at the pace.
    pub(super) cpu_seconds: f64,
    /// Of the benchmark's own processes and the kernel's.
    pub(super) own_seconds: f64,
    /// Percent of the answers of new connections.
    pub(super) canary_percent: f64,
    pub(super) answers: u64,
    pub(super) failed: u64,
    /// Percent of the processors.
    pub(super) others_percent: f64,
}

/// Medians over the rounds.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) subject: Subject,
    pub(super) connections_per_second: f64,
    /// For each second that the benchmark's own processes and the kernel's ran.
    pub(super) connections_per_own_second: f64,
    pub(super) requests_per_second: f64,
    pub(super) requests_p99_us: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) p999_us: f64,
    pub(super) cpu_seconds_per_thousand: f64,
    pub(super) own_seconds_per_thousand: f64,
    pub(super) canary_percent: f64,
    /// Over all rounds.
    pub(super) failed: u64,
    /// The most of a round.
    pub(super) others_percent: f64,
}

impl Row {
    pub(super) fn of(subject: Subject, turns: &[Turn]) -> Self {
        let middle = |field: fn(&Turn) -> f64| median(turns.iter().map(field).collect());
        Self {
            subject,
            connections_per_second: middle(|turn| turn.connections_per_second),
            connections_per_own_second: middle(|turn| turn.connections_per_own_second),
            requests_per_second: middle(|turn| turn.requests_per_second),
            requests_p99_us: middle(|turn| turn.requests_p99_us),
            p50_us: middle(|turn| turn.p50_us),
            p99_us: middle(|turn| turn.p99_us),
            p999_us: middle(|turn| turn.p999_us),
            cpu_seconds_per_thousand: middle(|turn| turn.cpu_seconds),
            own_seconds_per_thousand: middle(|turn| turn.own_seconds),
            canary_percent: middle(|turn| turn.canary_percent),
            failed: turns.iter().map(|turn| turn.failed).sum(),
            others_percent: turns.iter().map(|turn| turn.others_percent).fold(0.0, f64::max),
        }
    }
}

/// Whether a share of the canary can be what was asked, by its binomial error and, for round robin by
/// each of several processes, a little more.
pub(super) fn split_holds(turn: &Turn) -> bool {
    let share = 1.0 / ONE_IN as f64;
    let error = (share * (1.0 - share) / turn.answers.max(1) as f64).sqrt();
    (turn.canary_percent / 1e2 - share).abs() <= 5.0 * error + 0.005
}

/// What is aimed at.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Goal {
    pub(super) what: String,
    /// At least, or at most.
    pub(super) at_least: bool,
    pub(super) wanted: f64,
    /// The median of the rounds' ratios.
    pub(super) measured: f64,
    /// The same by the time that the benchmark's own processes and the kernel's ran, whatever others
    /// did; nothing of latency.
    pub(super) by_own: Option<f64>,
    pub(super) reached: bool,
}

/// All that can be told of the subjects that were measured.
pub(super) fn goals(rounds: &[(Subject, Vec<Turn>)]) -> Vec<Goal> {
    use Subject::{Dsr, DsrRouted, Haproxy, Nat, Nftables, Plain};
    type Field = fn(&Turn) -> f64;
    let of = |subject| rounds.iter().find(|(s, _)| *s == subject).map(|(_, turns)| turns);
    let ratio = |subject, to, field: Field| {
        let pairs = of(subject)?.iter().zip(of(to)?);
        Some(median(pairs.map(|(ours, theirs)| field(ours) / field(theirs)).collect()))
    };
    // What comes on top of plain forwarding: the difference within a round, and the median of those,
    // as a ratio of what may be nearly nothing means nothing.
    let above = |subject, field: Field| {
        let pairs = of(subject)?.iter().zip(of(Plain)?);
        Some(median(pairs.map(|(turn, plain)| field(turn) - field(plain)).collect()))
    };
    let above_ratio = |peer, field: Field| {
        let above_peer = above(peer, field).filter(|seconds: &f64| *seconds > 0.0)?;
        Some(above(Nat, field)? / above_peer)
    };
    let mut goals = Vec::new();
    let mut goal =
        |what: &str, at_least: bool, wanted: f64, measured: Option<f64>, by_own: Option<f64>| {
            if let Some(measured) = measured {
                let reached = if at_least { measured >= wanted } else { measured <= wanted };
                let what = what.to_owned();
                goals.push(Goal { what, at_least, wanted, measured, by_own, reached });
            }
        };
    for (what, subject, to, wanted) in [
        ("nat / nftables", Nat, Nftables, 1.15),
        ("nat / HAProxy", Nat, Haproxy, 1.5),
        ("dsr / plain forwarding", Dsr, Plain, 1.0),
        ("dsr routed back / plain forwarding", DsrRouted, Plain, 1.0),
    ] {
        let measured = ratio(subject, to, |turn| turn.connections_per_second);
        let by_own = ratio(subject, to, |turn| turn.connections_per_own_second);
        goal(&format!("new connections, {what}"), true, wanted, measured, by_own);
    }
    for (what, peer, wanted) in [("nftables", Nftables, 0.6), ("HAProxy", Haproxy, 0.1)] {
        let measured = above_ratio(peer, |turn| turn.cpu_seconds);
        let by_own = above_ratio(peer, |turn| turn.own_seconds);
        goal(&format!("CPU above plain forwarding, nat / {what}"), false, wanted, measured, by_own);
    }
    let p99 = ratio(Nat, Nftables, |turn| turn.p99_us);
    goal("p99 at the pace, nat / nftables", false, 1.0, p99, None);
    goals
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(connections: f64, cpu: f64) -> Turn {
        Turn {
            connections_per_second: connections,
            connections_per_own_second: connections / 2.0,
            requests_per_second: 1.0,
            requests_p99_us: 1.0,
            p50_us: 1.0,
            p99_us: connections,
            p999_us: 1.0,
            cpu_seconds: cpu,
            own_seconds: cpu,
            canary_percent: 10.0,
            answers: 10_000,
            failed: 1,
            others_percent: connections,
        }
    }

    #[test]
    fn a_row_has_medians_all_failures_and_the_worst_company() {
        let turns = [turn(3.0, 0.3), turn(1.0, 0.1), turn(2.0, 0.2)];
        let row = Row::of(Subject::Nat, &turns);
        assert_eq!(row.connections_per_second, 2.0);
        assert_eq!(row.cpu_seconds_per_thousand, 0.2);
        assert_eq!((row.failed, row.others_percent), (3, 3.0));
    }

    #[test]
    fn ratios_are_taken_within_rounds() {
        // The machine is twice as fast in the second round; each round says the same.
        let rounds = [
            (Subject::Plain, vec![turn(10.0, 0.1), turn(20.0, 0.05)]),
            (Subject::Nat, vec![turn(12.0, 0.11), turn(24.0, 0.06)]),
            (Subject::Nftables, vec![turn(10.0, 0.12), turn(20.0, 0.07)]),
        ];
        let goals = goals(&rounds);
        let found = |what: &str| goals.iter().find(|goal| goal.what.contains(what)).unwrap();
        assert!((found("nat / nftables").measured - 1.2).abs() < 1e-9);
        assert!(found("nat / nftables").reached);
        assert!((found("CPU above plain forwarding, nat / nftables").measured - 0.5).abs() < 1e-9);
        assert!((found("p99").measured - 1.2).abs() < 1e-9 && !found("p99").reached);
        assert!(!goals.iter().any(|goal| goal.what.contains("HAProxy")));
    }

    #[test]
    fn nothing_above_plain_forwarding_is_no_ratio() {
        let rounds = [
            (Subject::Plain, vec![turn(10.0, 0.1)]),
            (Subject::Nat, vec![turn(10.0, 0.1)]),
            (Subject::Nftables, vec![turn(10.0, 0.09)]),
        ];
        assert!(!goals(&rounds).iter().any(|goal| goal.what.starts_with("CPU")));
    }

    #[test]
    fn a_split_that_is_another_is_noticed() {
        let with = |percent, answers| Turn { canary_percent: percent, answers, ..turn(1.0, 1.0) };
        assert!(split_holds(&with(10.2, 50_000)));
        assert!(!split_holds(&with(11.5, 50_000)));
        assert!(split_holds(&with(11.5, 1_000)));
        assert!(!split_holds(&with(0.0, 1_000)) && !split_holds(&with(50.0, 1_000)));
    }
}
