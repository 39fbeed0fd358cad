//! `doctor`: whether this host is ready, for people and for programs.

use std::process::ExitCode;

use super::{
    client::Client,
    failure::{Failure, exit},
    print,
    text::{counted, plain},
    wait_for,
};
use crate::{
    api::model::{ErrorDetail, Status},
    config::{self, Loaded},
    doctor::{self, Check, Depth, Report, Verdict},
};

/// Looks at the host and says what it is not ready for.
pub(super) fn run(
    file: &std::path::Path,
    socket: Option<&std::path::Path>,
    client: &Client,
    json: bool,
) -> Result<ExitCode, Failure> {
    let Loaded { mut config, warnings, .. } = config::load(file).map_err(|diagnostics| {
        Failure::from(ErrorDetail {
            code: "bad_config".to_owned(),
            message: "the configuration is wrong: nothing of the host was looked at".to_owned(),
            help: None,
            exit_code: exit::BAD_CONFIG,
            diagnostics,
        })
    })?;
    if let Some(socket) = socket {
        config.agent.socket = socket.to_owned();
    }
    let agent = match wait_for(async { client.get("/v1/status").await?.read::<Status>() }) {
        Ok(status) => doctor::Asked::Answered(Box::new(status)),
        Err(failure) => match wait_for(async { Ok(client.is_anybody_there().await) })? {
            true => doctor::Asked::Silent(failure.to_string()),
            false => doctor::Asked::Nobody,
        },
    };
    let facts = doctor::collect(&config, Depth::Thorough(agent));
    let report = doctor::examine(&config, &warnings, &facts);
    if json {
        let line = serde_json::to_string(&report).map_err(|error| {
            Failure::new("failed", exit::FAILED, format!("can't write JSON: {error}"))
        })?;
        print(&format!("{line}\n"))?;
    } else {
        print(&shown(&report))?;
    }
    Ok(ExitCode::from(if report.ready { exit::DONE } else { exit::FAILED }))
}

fn shown(report: &Report) -> String {
    let word = |verdict| match verdict {
        Verdict::Ok => "ok",
        Verdict::Warning => "WARNING",
        Verdict::Failed => "FAILED",
        Verdict::NotChecked => "not checked",
    };
    let title = |check: &Check| match &check.about {
        Some(about) => format!("{} {about}", doctor::name(check.name)),
        None => doctor::name(check.name),
    };
    let width = report.checks.iter().map(|check| title(check).chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for check in &report.checks {
        let Check { verdict, found, evidence, remedy, .. } = check;
        let (title, found) = (plain(&title(check)), plain(found));
        text.push_str(&format!("{:<11}  {title:<width$}  {found}\n", word(*verdict)));
        if *verdict != Verdict::Ok {
            text.push_str(&format!("{:13}read: {}\n", "", plain(evidence)));
        }
        if let Some(remedy) = remedy {
            text.push_str(&format!("{:13}do:   {}\n", "", plain(remedy)));
        }
    }
    let count =
        |verdict| report.checks.iter().filter(|check| check.verdict == verdict).count() as u64;
    let ready = if report.ready { "ready" } else { "not ready" };
    text.push_str(&format!(
        "\n{ready}: {} failed, {}, {} not checked, {} ok\n",
        count(Verdict::Failed),
        counted(count(Verdict::Warning), "warning"),
        count(Verdict::NotChecked),
        count(Verdict::Ok)
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_shows_evidence_and_remedy_of_what_is_not_good() {
        let check = |verdict, about: Option<&str>, remedy: Option<&str>| Check {
            name: doctor::Name::Gro,
            about: about.map(str::to_owned),
            verdict,
            found: "on\x1b[2J".to_owned(),
            evidence: "ethtool -k".to_owned(),
            remedy: remedy.map(str::to_owned),
        };
        let report = Report {
            ready: false,
            version: "1".to_owned(),
            agent_pid: None,
            checks: vec![
                check(Verdict::Ok, Some("eth0"), None),
                check(Verdict::Failed, Some("eth1"), Some("ethtool -K eth1 gro off")),
            ],
        };
        assert_eq!(
            shown(&report),
            "ok           interface.gro eth0  on\u{fffd}[2J\n\
             FAILED       interface.gro eth1  on\u{fffd}[2J\n             read: ethtool -k\n             \
             do:   ethtool -K eth1 gro off\n\nnot ready: 1 failed, 0 warnings, 0 not checked, 1 ok\n"
        );
    }
}
