//! `plan`: what a rollout's gates would find.

use super::{
    args,
    client::{Client, encoded},
    failure::Failure,
    print,
    text::{self, Align, Table, age, percent},
};
use crate::rollout::outlook::{
    FaultOutlook, Outlook, ProbeOutlook, SignalOutlook, Source, StepOutlook,
};

/// Asks and prints.
pub(super) async fn run(client: &Client, asked: args::Plan, json: bool) -> Result<(), Failure> {
    let args::Plan { rollout, rate, usual } = asked;
    let mut target = format!("/v1/rollouts/{}/plan", encoded(&rollout));
    let usual = (!usual.is_empty()).then(|| usual.join(","));
    let keys = [("rate", rate), ("usual", usual)];
    let given = keys.into_iter().filter_map(|(key, value)| Some((key, value?)));
    for (number, (key, value)) in given.enumerate() {
        let mark = if number == 0 { '?' } else { '&' };
        target.push_str(&format!("{mark}{key}={}", encoded(&value)));
    }
    let answer = client.get(&target).await?;
    match json {
        true => print(&format!("{}\n", answer.text())),
        false => print(&drawn(&answer.read()?)),
    }
}

fn drawn(outlook: &Outlook) -> String {
    let Outlook {
        rollout,
        service,
        to,
        connections_per_second,
        rate_source,
        power,
        steps,
        warnings,
    } = outlook;
    let mut out = format!(
        "rollout {rollout}: {service} to {to}, at {} new connections a second ({})\n",
        rate(*connections_per_second),
        word(*rate_source)
    );
    out = out.lines().map(|line| format!("{}\n", text::plain(line))).collect();
    for step in steps {
        out.push('\n');
        out.push_str(&drawn_step(step, *power));
    }
    out + &warned(warnings)
}

/// Warnings, each on a line of its own, with an empty one before them.
pub(super) fn warned(warnings: &[String]) -> String {
    let lines: String =
        warnings.iter().map(|one| format!("warning: {}\n", text::plain(one))).collect();
    if lines.is_empty() { lines } else { format!("\n{lines}") }
}

fn drawn_step(step: &StepOutlook, power: f64) -> String {
    let StepOutlook {
        step: number,
        audience,
        share,
        gate,
        min_duration_seconds,
        deadline_seconds,
        canary_per_second,
        control_per_second,
        canary_watched_per_second,
        control_watched_per_second,
        passes,
        false_fail,
        passes_half_after_seconds,
        passes_after_seconds: _,
        signals,
        probes,
    } = step;
    let whose = audience.as_ref().map_or_else(String::new, |name| format!(" of {name}"));
    let mut lines = vec![format!(
        "step {number}: {share}{whose}, gate {gate}; passes after {} at the earliest, decides until {}",
        age(*min_duration_seconds),
        age(*deadline_seconds)
    )];
    if let (Some(passes), Some(fails)) = (passes, false_fail) {
        lines.push(format!(
            "  {} connections a second of the canary, {} of control; {} and {} of them are watched",
            rate(*canary_per_second),
            rate(*control_per_second),
            rate(*canary_watched_per_second),
            rate(*control_watched_per_second)
        ));
        let after = passes_half_after_seconds
            .map_or_else(String::new, |after| format!(", half of such after {}", age(after)));
        lines.push(format!(
            "  a canary as good as control passes in time with a chance of {}{after}; it fails with {}",
            chance(*passes),
            chance(*fails)
        ));
    }
    for signal in signals {
        let SignalOutlook { name, usual_rate, usual_source, smallest_fault, faults: _ } = signal;
        let finds = match smallest_fault {
            Some(ratio) => format!("finds ×{ratio} and more with {} or more", chance(power)),
            None => "finds nothing that can be relied on".to_owned(),
        };
        lines.push(format!(
            "  {name}, of {} of control's connections ({}): {finds}",
            percent(*usual_rate),
            word(*usual_source)
        ));
    }
    let mut out: String = lines.iter().map(|line| format!("{}\n", text::plain(line))).collect();
    if passes.is_some() && !signals.is_empty() {
        out.push_str(&faults(signals));
    }
    if !probes.is_empty() {
        out.push_str(&asked(probes));
    }
    out
}

fn faults(signals: &[SignalOutlook]) -> String {
    let mut table = Table::new([
        ("SIGNAL", Align::Left),
        ("FAULT", Align::Right),
        ("BAD", Align::Right),
        ("FOUND", Align::Right),
        ("PASSED", Align::Right),
        ("AFTER", Align::Right),
        ("CANARY'S CONNECTIONS", Align::Right),
    ]);
    for SignalOutlook { name, faults, .. } in signals {
        // From where there is a chance, to where there is no more doubt.
        let last = faults.iter().position(|fault| fault.found >= 0.995);
        let last = last.unwrap_or(faults.len().saturating_sub(1));
        let worth =
            |(at, fault): &(usize, &FaultOutlook)| *at == last || *at < last && fault.found >= 0.01;
        for (_, fault) in faults.iter().enumerate().filter(worth) {
            let FaultOutlook { ratio, rate, found, passed, after_seconds, canary_connections } =
                fault;
            table.row([
                name.clone(),
                format!("×{ratio}"),
                percent(*rate),
                chance(*found),
                chance(*passed),
                after_seconds.map_or_else(|| "-".to_owned(), age),
                canary_connections.map_or_else(|| "-".to_owned(), |count| format!("{count:.0}")),
            ]);
        }
    }
    table.render("    ")
}

fn asked(probes: &[ProbeOutlook]) -> String {
    let mut table = Table::new([
        ("ASKED", Align::Left),
        ("PASSES AFTER", Align::Right),
        ("FAILS AFTER", Align::Right),
    ]);
    for probe in probes {
        let ProbeOutlook { kind, asked, observe, passes_after_seconds, fails_after_seconds } =
            probe;
        let shown = if *observe { " (observed)" } else { "" };
        table.row([
            format!("{kind} {asked}{shown}"),
            age(*passes_after_seconds),
            age(*fails_after_seconds),
        ]);
    }
    table.render("    ")
}

/// A chance that was simulated is not told more exactly than it is known.
fn chance(part: f64) -> String {
    match part {
        part if part > 0.0 && part < 0.01 => "<1%".to_owned(),
        part if part > 0.99 && part < 1.0 => ">99%".to_owned(),
        part => format!("{:.0}%", part * 100.0),
    }
}

fn rate(per_second: f64) -> String {
    match per_second {
        rate if rate >= 10.0 => format!("{rate:.0}"),
        rate => format!("{rate:.3}").trim_end_matches('0').trim_end_matches('.').to_owned(),
    }
}

const fn word(source: Source) -> &'static str {
    match source {
        Source::Asked => "as asked",
        Source::Counted => "counted",
        Source::Defined => "by definition",
        Source::Assumed => "assumed: --usual says better",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_say_what_is_known_of_them() {
        for (part, text) in [
            (0.0, "0%"),
            (0.005, "<1%"),
            (0.015, "2%"),
            (0.9, "90%"),
            (0.995, ">99%"),
            (1.0, "100%"),
        ] {
            assert_eq!(chance(part), text);
        }
        for (per_second, text) in [(2000.4, "2000"), (9.5, "9.5"), (0.25, "0.25"), (2.0, "2")] {
            assert_eq!(rate(per_second), text);
        }
    }
}
