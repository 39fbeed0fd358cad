//! `explain`: where a client's connections go, in sentences.

use super::{
    args,
    client::{Client, encoded},
    failure::Failure,
    print, text,
};
use crate::api::model::Explain;

/// Asks the agent and prints what it says.
pub(super) async fn run(client: &Client, query: args::Explain, json: bool) -> Result<(), Failure> {
    let args::Explain { service, from, to, protocol } = query;
    let mut target = format!("/v1/services/{}/explain?from={}", encoded(&service), encoded(&from));
    if let Some(to) = to {
        target.push_str(&format!("&to={}", encoded(&to.to_string())));
    }
    if let Some(protocol) = protocol {
        target.push_str(&format!("&protocol={}", protocol.name()));
    }
    let answer = client.get(&target).await?;
    if json {
        return print(&format!("{}\n", answer.text()));
    }
    print(&sentences(&answer.read()?))
}

fn sentences(explain: &Explain) -> String {
    let Explain {
        service,
        from,
        to,
        protocol,
        audience,
        bucket,
        version,
        backend,
        tracked,
        previous,
        why,
    } = explain;
    let mut lines = vec![match (version, backend) {
        (Some(version), Some(backend)) => {
            format!(
                "A new {protocol} connection from {from} to {to} goes to {backend}, version {version} of {service}."
            )
        }
        (Some(version), None) => {
            format!(
                "A new {protocol} connection from {from} to {to} belongs to version {version} of {service}, and gets nothing."
            )
        }
        (None, _) => {
            format!(
                "Where a new {protocol} connection from {from} to {to} goes in {service} can't be said."
            )
        }
    }];
    if let Some(audience) = audience {
        lines.push(format!("The client is in the audience {audience}."));
    }
    match bucket {
        Some(bucket) => lines.push(format!("Its bucket is {bucket}.")),
        None => lines
            .push("The bucket depends on the client's port: give it as ADDRESS:PORT.".to_owned()),
    }
    if *tracked {
        let where_to = previous.as_ref().map_or_else(
            || "stay where they are".to_owned(),
            |previous| format!("stay at {previous}"),
        );
        lines.push(format!(
            "The bucket has moved within the drain time: connections that are older {where_to}."
        ));
    }
    lines.extend(why.iter().map(|why| format!("- {why}")));
    let mut out: String = lines.iter().map(|line| text::plain(line)).collect::<Vec<_>>().join("\n");
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_is_told_in_sentences() {
        let explain = Explain {
            service: "shop".to_owned(),
            from: "192.0.2.7".to_owned(),
            to: "203.0.113.10:443".to_owned(),
            protocol: "tcp".to_owned(),
            audience: Some("staff".to_owned()),
            bucket: Some(1234),
            version: Some("v2".to_owned()),
            backend: Some("10.0.2.1:8443".to_owned()),
            tracked: true,
            previous: Some("10.0.1.1:8443".to_owned()),
            why: vec!["staff get v2".to_owned()],
        };
        assert_eq!(
            sentences(&explain),
            "A new tcp connection from 192.0.2.7 to 203.0.113.10:443 goes to 10.0.2.1:8443, \
             version v2 of shop.\n\
             The client is in the audience staff.\n\
             Its bucket is 1234.\n\
             The bucket has moved within the drain time: connections that are older stay at \
             10.0.1.1:8443.\n\
             - staff get v2\n"
        );
        let unknown =
            Explain { bucket: None, version: None, backend: None, tracked: false, ..explain };
        assert!(sentences(&unknown).contains("give it as ADDRESS:PORT"));
    }
}
