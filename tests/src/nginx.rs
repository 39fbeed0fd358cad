//! A real nginx on a backend, where the host has one.
//!
//! It answers as [`crate::server`] does over HTTP, as far as static files can:
//! its name, `/bytes/N` for the files that it is given, and [`HEALTH_PATH`].
//! Nothing of the host's own configuration is used, and nothing is left behind.

use std::{
    env, fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Stdio},
};

use crate::{
    http::fill,
    server::{HEALTH_PATH, HTTP_PORT, SERVER_HEADER},
    spawn,
    topology::Host,
    wait,
};

/// The program, if it is installed: beside what `PATH` names, where Debian has it.
pub fn find() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    folders.map(|folder| folder.join("nginx")).find(|program| program.is_file())
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
        let folder = tempfile::tempdir().expect("a folder");
        let bytes = folder.path().join("bytes");
        fs::create_dir(&bytes).expect("a folder");
        for length in lengths {
            let mut body = vec![0; *length as usize];
            fill(&mut body, 0);
            fs::write(bytes.join(length.to_string()), body).expect("a file");
        }
        let addrs: Vec<SocketAddr> =
            host.addrs().into_iter().map(|addr| SocketAddr::new(addr, HTTP_PORT)).collect();
        let configuration = folder.path().join("nginx.conf");
        fs::write(&configuration, configure(folder.path(), &host.name, &addrs)).expect("a file");
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

fn configure(folder: &Path, name: &str, addrs: &[SocketAddr]) -> String {
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
         \x20 server {{\n{listen}    root {folder};\n    add_header {SERVER_HEADER} {name} always;\n\
         \x20   location = / {{ return 200 {name}; }}\n\
         \x20   location = {HEALTH_PATH} {{ if (-f {folder}/{UNHEALTHY}) {{ return 503; }} return 200 ok; }}\n  }}\n}}\n"
    )
}
