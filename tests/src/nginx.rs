//! A real nginx on a backend, where the host has one.
//!
//! It answers as [`crate::server`] does over HTTP, as far as static files can:
//! its name, `/bytes/N` for the files that it is given, and [`HEALTH_PATH`]. With a
//! certificate it does so over TLS and HTTP/2 as well, and keeps what is put under `/put/`.
//! Nothing of the host's own configuration is used, and nothing is left behind.

use std::{
    env, fs, io,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Stdio},
};

use crate::{
    binary,
    http::fill,
    server::{HEALTH_PATH, HTTP_PORT, SERVER_HEADER},
    spawn,
    topology::Host,
    wait,
};

/// Port of TLS.
pub const HTTPS_PORT: u16 = 443;

/// Where `cargo xtask setup` unpacks it below the user's cache, as in `xtask/src/setup/clients.rs`.
const UNPACKED: &str = "canary-xdp/nginx/usr/sbin/nginx";

/// What proves who a server is, as PEM.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

/// The program that `cargo xtask setup` has unpacked, if it did.
pub fn unpacked() -> Option<PathBuf> {
    let cache = env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| env::home_dir().map(|home| home.join(".cache")))?;
    Some(cache.join(UNPACKED)).filter(|program| program.is_file())
}

/// The program, if it is installed.
pub fn find() -> Option<PathBuf> {
    binary::installed("nginx")
}

/// A running nginx; killed on drop.
#[derive(Debug)]
pub struct Nginx {
    child: Child,
    folder: tempfile::TempDir,
}

impl Nginx {
    /// Starts it on [`HTTP_PORT`] of all of a host's addresses, with files of these
    /// lengths under `/bytes/`.
    ///
    /// # Panics
    /// It does not answer.
    #[track_caller]
    pub fn start(program: &Path, host: &Host, lengths: &[u64]) -> Self {
        Self::start_with(program, host, lengths, None)
    }

    /// The same with TLS and HTTP/2 on [`HTTPS_PORT`].
    ///
    /// # Panics
    /// It does not answer.
    #[track_caller]
    pub fn start_tls(program: &Path, host: &Host, lengths: &[u64], identity: &Identity) -> Self {
        Self::start_with(program, host, lengths, Some(identity))
    }

    #[track_caller]
    fn start_with(
        program: &Path,
        host: &Host,
        lengths: &[u64],
        identity: Option<&Identity>,
    ) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let bytes = folder.path().join("bytes");
        fs::create_dir(&bytes).expect("a folder");
        for length in lengths {
            let mut body = vec![0; *length as usize];
            fill(&mut body, 0);
            fs::write(bytes.join(length.to_string()), body).expect("a file");
        }
        let on = |port| host.addrs().into_iter().map(move |addr| SocketAddr::new(addr, port));
        let mut addrs: Vec<SocketAddr> = on(HTTP_PORT).collect();
        let mut tls = String::new();
        if let Some(identity) = identity {
            fs::write(folder.path().join("certificate.pem"), &identity.certificate)
                .expect("a file");
            fs::write(folder.path().join("key.pem"), &identity.key).expect("a file");
            fs::create_dir(folder.path().join("put")).expect("a folder");
            tls = with_tls(folder.path(), on(HTTPS_PORT));
        }
        let configuration = folder.path().join("nginx.conf");
        let text = configure(folder.path(), &host.name, &addrs, &tls);
        fs::write(&configuration, text).expect("a file");
        addrs.extend(on(HTTPS_PORT).filter(|_| identity.is_some()));
        // Read by whoever it turns itself into, when it is started by root.
        open_to_all(folder.path());
        let mut command = host.namespace.command(program);
        command.arg("-e").arg("stderr").arg("-p").arg(folder.path()).arg("-c").arg(&configuration);
        command.stdout(Stdio::null());
        let child = spawn::spawn(command).unwrap_or_else(|error| panic!("nginx: {error}"));
        let nginx = Self { child, folder };
        wait::until("nginx", || {
            let connected = host
                .namespace
                .run(|| addrs.iter().try_for_each(|addr| TcpStream::connect(addr).map(drop)));
            connected.map_err(|error| error.to_string())
        });
        nginx
    }

    /// What was put at `/put/NAME`.
    ///
    /// # Errors
    /// Nothing was.
    pub fn put(&self, name: &str) -> io::Result<Vec<u8>> {
        fs::read(self.folder.path().join("put").join(name))
    }

    /// Says whether [`HEALTH_PATH`] is answered with 200 or 503; nothing else changes.
    ///
    /// # Panics
    /// Its folder can't be written.
    pub fn set_healthy(&self, healthy: bool) {
        let mark = self.folder.path().join(UNHEALTHY);
        let set = if healthy { fs::remove_file(&mark) } else { fs::write(&mark, "") };
        set.unwrap_or_else(|error| panic!("{}: {error}", mark.display()));
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // It is one process, so nothing of it is left.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A file that makes it unhealthy.
const UNHEALTHY: &str = "unhealthy";

fn open_to_all(folder: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).expect("a mode");
}

/// Lines of the server that speaks TLS too.
fn with_tls(folder: &Path, addrs: impl Iterator<Item = SocketAddr>) -> String {
    let listen: String = addrs.map(|addr| format!("    listen {addr} ssl http2;\n")).collect();
    let folder = folder.display();
    format!(
        "{listen}    ssl_certificate {folder}/certificate.pem;\n    ssl_certificate_key {folder}/key.pem;\n\
         \x20   client_max_body_size 100m;\n    location /put/ {{ dav_methods PUT; }}\n"
    )
}

fn configure(folder: &Path, name: &str, addrs: &[SocketAddr], tls: &str) -> String {
    let listen: String = addrs.iter().map(|addr| format!("    listen {addr};\n")).collect();
    let folder = folder.display();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|kind| format!("  {kind}_temp_path {folder}/{kind};\n"))
        .collect();
    // One process, so that its end is the end of all; connections that rest are kept.
    format!(
        "daemon off;\nmaster_process off;\npid {folder}/nginx.pid;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n  access_log off;\n  keepalive_timeout 1h;\n  keepalive_requests 1000000;\n{temporary}\
         \x20 server {{\n{listen}{tls}    root {folder};\n    add_header {SERVER_HEADER} {name} always;\n\
         \x20   location = / {{ return 200 {name}; }}\n\
         \x20   location = {HEALTH_PATH} {{ if (-f {folder}/{UNHEALTHY}) {{ return 503; }} return 200 ok; }}\n  }}\n}}\n"
    )
}
