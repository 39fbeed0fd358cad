//! `audience`: shows audiences, and what a client is.

use super::{
    args::Audience,
    client::{Client, encoded},
    failure::Failure,
    print,
    text::{self, Align, Table, counted},
};
use crate::api::audience::{
    AudienceRoute, AudienceStatus, Audiences, ClientReport, ClientRoute, HoldingAudience,
};

/// Asks the agent and prints what it says.
pub(super) async fn run(client: &Client, command: Audience, json: bool) -> Result<(), Failure> {
    let target = match &command {
        Audience::List => "/v1/audiences".to_owned(),
        Audience::Show { name } => format!("/v1/audiences/{}", encoded(name)),
        Audience::Test { address } => format!("/v1/clients/{address}"),
    };
    let answer = client.get(&target).await?;
    if json {
        return print(&format!("{}\n", answer.text()));
    }
    print(&match command {
        Audience::List => listed(&answer.read()?),
        Audience::Show { .. } => shown(&answer.read()?),
        Audience::Test { .. } => tested(&answer.read()?),
    })
}

fn listed(Audiences { audiences }: &Audiences) -> String {
    if audiences.is_empty() {
        return "there is no audience\n".to_owned();
    }
    let mut table = Table::new([
        ("AUDIENCE", Align::Left),
        ("IPV4 NETWORKS", Align::Right),
        ("ADDRESSES", Align::Right),
        ("IPV6 NETWORKS", Align::Right),
        ("ROUTES", Align::Left),
    ]);
    for one in audiences {
        let routes: Vec<&str> = one.routes.iter().map(|route| route.service.as_str()).collect();
        table.row([
            one.name.clone(),
            one.networks_v4.to_string(),
            one.addresses_v4.to_string(),
            one.networks_v6.to_string(),
            routes.join(", "),
        ]);
    }
    table.render("")
}

fn shown(audience: &AudienceStatus) -> String {
    let AudienceStatus {
        name,
        networks_v4,
        addresses_v4,
        networks_v6,
        addresses_v6,
        file,
        mmdb,
        expression,
        examples,
        routes,
    } = audience;
    let mut lines = vec![
        name.clone(),
        format!(
            "  IPv4: {}, {}",
            counted(*networks_v4 as u64, "network"),
            match addresses_v4 {
                1 => "1 address".to_owned(),
                count => format!("{count} addresses"),
            }
        ),
        format!("  IPv6: {}, {addresses_v6} addresses", counted(*networks_v6 as u64, "network")),
    ];
    lines.extend(file.iter().map(|file| format!("  file: {file}")));
    lines.extend(mmdb.iter().map(|file| format!("  mmdb: {file}")));
    lines.extend(expression.iter().map(|asked| format!("  where: {asked}")));
    if !examples.is_empty() {
        lines.push(format!("  such as: {}", examples.join(", ")));
    }
    if routes.is_empty() {
        lines.push("  no route names it".to_owned());
    }
    for AudienceRoute { service, place, split, table } in routes {
        let split = if split.is_empty() { "control alone" } else { split };
        lines.push(format!("  route {place} of {service}: {split} (`split {table} …` changes it)"));
    }
    told(&lines)
}

fn tested(ClientReport { address, audiences, services }: &ClientReport) -> String {
    let mut lines = vec![match audiences.is_empty() {
        true => format!("{address} is in no audience"),
        false => {
            let one = |HoldingAudience { name, network }: &HoldingAudience| {
                format!("{name} (as one of {network})")
            };
            let names: Vec<String> = audiences.iter().map(one).collect();
            format!("{address} is in {}", names.join(", "))
        }
    }];
    for ClientRoute { service, audience, tracked, previous } in services {
        let of = |audience: &Option<String>| match audience {
            Some(name) => format!("the route of {name}"),
            None => "the service's own split".to_owned(),
        };
        let older = match tracked {
            true => format!("; connections from before its last change go by {}", of(previous)),
            false => String::new(),
        };
        lines.push(format!("  {service}: {}{older}", of(audience)));
    }
    told(&lines)
}

fn told(lines: &[String]) -> String {
    let mut out = lines.iter().map(|line| text::plain(line)).collect::<Vec<_>>().join("\n");
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_told_of_in_sentences() {
        let report = ClientReport {
            address: "198.51.100.7".to_owned(),
            audiences: vec![HoldingAudience {
                name: "staff".to_owned(),
                network: "198.51.100.0/24".to_owned(),
            }],
            services: vec![
                ClientRoute {
                    service: "shop".to_owned(),
                    audience: Some("staff".to_owned()),
                    tracked: true,
                    previous: None,
                },
                ClientRoute { service: "blog".to_owned(), ..ClientRoute::default() },
            ],
        };
        assert_eq!(
            tested(&report),
            "198.51.100.7 is in staff (as one of 198.51.100.0/24)\n\
             \x20 shop: the route of staff; connections from before its last change go by the \
             service's own split\n\
             \x20 blog: the service's own split\n"
        );
    }
}
