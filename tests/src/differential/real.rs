//! What real programs send to a service, as it is on the wire.

use std::process::{Child, Command, Stdio};

use crate::{
    names::Host,
    netns::Namespace,
    server::Server,
    spawn::spawn,
    topology::{self, Family},
    wait,
    wire::Watch,
};

/// A server that ends with the value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

/// The command in the namespace, silent.
fn command(namespace: &Namespace, line: &str) -> Command {
    let mut words = line.split_whitespace();
    let mut command = namespace.command(words.next().unwrap_or_default());
    command.args(words).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Runs a client until it has been served once; its server may not listen yet. Answers whether
/// this host has it.
///
/// # Panics
/// It is not served.
fn ran(client: &Namespace, line: &str) -> bool {
    wait::until(line, || {
        let Ok(child) = spawn(command(client, line)) else { return Ok(false) };
        let status = Running(child).0.wait().map_err(|error| error.to_string())?;
        if status.success() { Ok(true) } else { Err(status.to_string()) }
    })
}

/// Frames of requests, transfers, look-ups, echoes and traces to the first virtual address, by all
/// of curl, iperf3, dig, ping and traceroute that this host has, and which those are. Ports are the
/// service's.
///
/// # Panics
/// There is no network namespace to be had.
pub fn record() -> (Vec<Vec<u8>>, Vec<String>) {
    let (client, server) = (Namespace::new("client"), Namespace::new("server"));
    client.ip(&format!("link add eth0 type veth peer name eth0 netns {}", server.name()));
    for (namespace, host) in [(&client, Host::Client(1)), (&server, Host::Vip(1))] {
        namespace.ip(&format!(
            "address add {}/8 dev eth0\naddress add {}/16 dev eth0 nodad\nlink set eth0 up",
            host.v4(),
            host.v6()
        ));
    }
    let host = topology::Host {
        version: "stable".to_owned(),
        name: "stable-1".to_owned(),
        namespace: server,
        v4: Host::Vip(1).v4(),
        v6: Host::Vip(1).v6(),
        vips: Vec::new(),
    };
    let _http = Server::start(&host);
    let server = &host.namespace;
    // The others where this host has them.
    let start = |line: &str| spawn(command(server, line)).ok().map(Running);
    let iperf3 = start("iperf3 --server");
    // It changes neither user nor group so, and thereby ends with this process.
    let dns = start(
        "dnsmasq --no-daemon --no-resolv --no-hosts --conf-file=/dev/null --pid-file= \
         --address=/example/192.0.2.1",
    );
    let watch = Watch::frames(server, "eth0");
    let mut used = Vec::new();
    for family in Family::ALL {
        let (vip, url, option) = match family {
            Family::V4 => (Host::Vip(1).v4().to_string(), Host::Vip(1).v4().to_string(), "-4"),
            Family::V6 => (Host::Vip(1).v6().to_string(), format!("[{}]", Host::Vip(1).v6()), "-6"),
        };
        for (served, line) in [
            (true, format!("curl --silent --fail http://{url}/bytes/100000")),
            (true, format!("curl --silent --fail --data hello http://{url}/")),
            (iperf3.is_some(), format!("iperf3 {option} --client {vip} --bytes 100K")),
            (iperf3.is_some(), format!("iperf3 {option} --client {vip} --bytes 50K --reverse")),
            (iperf3.is_some(), format!("iperf3 {option} --client {vip} --bytes 50K -u -l 1400")),
            (iperf3.is_some(), format!("iperf3 {option} --client {vip} --bytes 50K -u -l 1900")),
            (dns.is_some(), format!("dig {option} +timeout=2 +tries=1 @{vip} www.example")),
            (dns.is_some(), format!("dig {option} +timeout=2 +tries=1 +tcp @{vip} www.example")),
            (true, format!("ping {option} -c 2 -i 0.01 -W 1 {vip}")),
            (true, format!("ping {option} -c 1 -W 1 -s 3000 {vip}")),
            (true, format!("traceroute {option} -q 1 -w 1 {vip}")),
            (true, format!("traceroute {option} -q 1 -w 1 -I {vip}")),
            (true, format!("traceroute {option} -q 1 -w 1 -T -p 80 {vip}")),
        ] {
            if !served || !ran(&client, &line) {
                continue;
            }
            let program = line.split_whitespace().next().unwrap_or_default().to_owned();
            if !used.contains(&program) {
                used.push(program);
            }
        }
    }
    let mut frames = watch.finish().frames;
    frames.iter_mut().for_each(|frame| super::frames::to_port(frame, 80));
    (frames, used)
}
