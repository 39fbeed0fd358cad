//! curl and nginx: HTTP/1.1, and HTTP/2 over TLS.

use std::fs;

use canary_tests::{
    agent::{Agent, AgentOptions},
    http,
    nginx::{self, HTTPS_PORT, Identity, Nginx},
    topology::Family,
};

use super::{
    Came, Client, HTTP_PORT, KEYS, Mode, assert_only, clients, host, in_every_mode, in_url,
    lacking, ready, run,
};
use crate::support::{Bench, SHOP};

/// The service of TLS.
const SECURE: &str = "secure";

/// The name in the servers' certificate.
const NAME: &str = "shop.test";

/// Lengths of what is fetched: less than a segment, some, and many.
const LENGTHS: &[u64] = &[1, 1_400, 70_000, 2_000_000];

/// Bytes that are sent.
const UPLOAD_BYTES: usize = 1_000_000;

struct Web<'a> {
    bench: &'a Bench,
    servers: &'a [Nginx],
    folder: &'a std::path::Path,
}

impl Web<'_> {
    /// curl of a client in this folder; what it says of each transfer.
    #[track_caller]
    fn curl(&self, client: &Client, arguments: &str) -> Vec<String> {
        let folder = self.folder.display();
        let said = run(
            self.bench.client(),
            &format!(
                "curl --silent --show-error --fail --max-time 15 --interface {} --cacert \
                 {folder}/ca.pem --write-out %{{http_version}}/%header{{x-server}}/\
                 %{{num_connects}}\\n {arguments}",
                client.addr
            ),
        );
        said.lines().map(str::to_owned).collect()
    }

    /// Fetches files of all lengths and looks at each byte; all come over one connection.
    #[track_caller]
    fn fetch(&self, client: &Client, version: &str, options: &str, url: &str) {
        let what = format!("{url} from {}", client.addr);
        let lengths: Vec<String> = LENGTHS.iter().map(ToString::to_string).collect();
        let folder = self.folder.display();
        let said = self.curl(
            client,
            &format!("{options} --output {folder}/#1 {url}/bytes/{{{}}}", lengths.join(",")),
        );
        assert_eq!(said.len(), LENGTHS.len(), "{what}: {said:?}");
        let mut connects = 0;
        for line in &said {
            let mut words = line.split('/');
            assert_eq!(words.next(), Some(version), "{what}: {line}");
            assert_eq!(words.next(), Some(client.backend.as_str()), "{what}: {line}");
            connects += words.next().and_then(|word| word.parse::<u32>().ok()).expect("a number");
        }
        assert_eq!(connects, 1, "{what}: {said:?}");
        for length in LENGTHS {
            let path = self.folder.join(length.to_string());
            let body = fs::read(&path).expect("what was fetched");
            assert_eq!(body.len() as u64, *length, "{what}");
            assert_eq!(http::first_difference(&body, 0), None, "{what}");
            fs::remove_file(path).expect("a file");
        }
        let name = run(
            self.bench.client(),
            &format!(
                "curl --silent --fail --max-time 15 --interface {} --cacert {folder}/ca.pem \
                 {options} {url}/",
                client.addr
            ),
        );
        assert_eq!(name, client.backend, "{what}");
    }

    /// Sends a file, which is on that server then.
    #[track_caller]
    fn upload(&self, client: &Client, version: &str, options: &str, url: &str) {
        let folder = self.folder.display();
        let name = format!("{}-{version}", client.addr).replace(':', "-");
        let said =
            self.curl(client, &format!("{options} --upload-file {folder}/upload {url}/put/{name}"));
        let expected = format!("{version}/{}/1", client.backend);
        assert_eq!(said, [expected], "{url} from {}", client.addr);
        let hosts = &self.bench.topology.backends;
        let at = hosts.iter().position(|host| host.name == client.backend).expect("a backend");
        let body = self.servers[at].put(&name).expect("what was sent");
        assert_eq!(body.len(), UPLOAD_BYTES);
        assert_eq!(http::first_difference(&body, 0), None, "{url} from {}", client.addr);
    }
}

#[track_caller]
fn exercise(test: &str, mode: Mode) {
    if !ready(test, &["curl"]) {
        return;
    }
    let Some(program) = nginx::find().or_else(nginx::unpacked) else {
        return host::skip(test, &lacking("nginx"));
    };
    let made = rcgen::generate_simple_self_signed(vec![NAME.to_owned()]).expect("a key");
    let identity = Identity { certificate: made.cert.pem(), key: made.signing_key.serialize_pem() };
    let bench = mode.bench_without_http();
    let hosts = &bench.topology.backends;
    let servers: Vec<Nginx> =
        hosts.iter().map(|host| Nginx::start_tls(&program, host, LENGTHS, &identity)).collect();
    let services = bench.service(SHOP, HTTP_PORT, &["tcp"], KEYS)
        + &bench.service(SECURE, HTTPS_PORT, &["tcp"], KEYS);
    let agent = Agent::start(&bench.topology, &AgentOptions::native(&bench.topology), &services);
    bench.wait_answered();
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("ca.pem"), &identity.certificate).expect("a file");
    let mut upload = vec![0; UPLOAD_BYTES];
    http::fill(&mut upload, 0);
    fs::write(folder.path().join("upload"), &upload).expect("a file");
    let web = Web { bench: &bench, servers: &servers, folder: folder.path() };
    for family in Family::ALL {
        let vip = in_url(family.vip());
        for client in clients(&bench, &agent, SHOP, family, 0) {
            let before = Came::to_all_at_rest(&bench);
            web.fetch(&client, "1.1", "--http1.1", &format!("http://{vip}"));
            web.upload(&client, "1.1", "--http1.1", &format!("http://{vip}"));
            assert_only(&bench, &before, &client.backend, test);
        }
        // Many streams at once on one connection.
        let options = format!("--http2 --parallel --resolve {NAME}:{HTTPS_PORT}:{vip}");
        for client in clients(&bench, &agent, SECURE, family, 500) {
            let before = Came::to_all_at_rest(&bench);
            web.fetch(&client, "2", &options, &format!("https://{NAME}"));
            web.upload(&client, "2", &options, &format!("https://{NAME}"));
            assert_only(&bench, &before, &client.backend, test);
        }
    }
}

in_every_mode!(exercise:
    curl_and_nginx_speak_http_through_nat,
    curl_and_nginx_speak_http_through_one_armed_nat,
    curl_and_nginx_speak_http_through_dsr,
    curl_and_nginx_speak_http_through_ipip,
    curl_and_nginx_speak_http_through_gue
);
