//! Files and what can be wrong with them: paths, encodings, size, depth.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use canary_agent::config::{load, load_bytes, load_str, render};

use super::support::{AGENT, Host, MAIN, SERVICE, check_places, good};

fn write(directory: &Path, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
    let path = directory.join(name);
    fs::create_dir_all(path.parent().expect("a parent")).expect("directory");
    fs::write(&path, text).expect("written");
    path
}

/// Loads `path`, which must fail, and gives the errors as text.
fn refused(path: &Path) -> String {
    render(&load(path).expect_err("it is bad"))
}

#[test]
fn drop_ins_follow_in_the_order_of_their_names() {
    let directory = tempfile::tempdir().expect("a directory");
    let service = |name: &str, vip: u8| {
        format!(
            "[[service]]\nname = \"{name}\"\nvip = \"192.0.2.{vip}\"\nports = \"tcp/80\"\n\
             versions.stable.backends = \"10.0.0.1:80\"\n"
        )
    };
    let main = write(directory.path(), MAIN, service("main", 1));
    write(directory.path(), "conf.d/20-b.toml", service("b", 2));
    write(directory.path(), "conf.d/10-a.toml", service("a", 3));
    write(directory.path(), "conf.d/30-agent.toml", AGENT);
    write(directory.path(), "conf.d/40-agent.toml", "[agent.capacity]\nservices = 3\n");
    write(directory.path(), "conf.d/README", "not TOML");
    write(directory.path(), "conf.d/50-c.toml.bak", "not TOML");
    write(directory.path(), "conf.d/.hidden.toml", "not TOML");
    write(directory.path(), "conf.d/sub/x.toml", "not TOML");
    let loaded = load(&main).unwrap_or_else(|errors| panic!("{}", render(&errors)));
    let names: Vec<&str> = loaded.config.services.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["main", "a", "b"]);
    assert_eq!(loaded.config.agent.capacity.services, 3);
    let files: Vec<String> = loaded
        .files
        .iter()
        .map(|f| f.file_name().expect("a name").to_string_lossy().into())
        .collect();
    assert_eq!(files, [MAIN, "10-a.toml", "20-b.toml", "30-agent.toml", "40-agent.toml"]);
}

#[test]
fn every_bad_line_of_an_audience_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let text = format!(
        "{AGENT}{SERVICE}[[service.route]]\naudience = \"staff\"\nsplit = {{}}\n\
         [[audience]]\nname = \"staff\"\nfile = \"staff.cidr\"\n"
    );
    let main = write(directory.path(), MAIN, &text);
    write(directory.path(), "staff.cidr", "# staff\n198.51.100.0/24\n");
    let loaded = load(&main).unwrap_or_else(|errors| panic!("{}", render(&errors)));
    assert_eq!(loaded.config.audiences[0].networks.len(), 1);
    assert_eq!(loaded.config.services[0].routes[0].audience, "staff");

    write(directory.path(), "staff.cidr", "198.51.100.0/24\n  office\n\n10.0.0.1/8 # x\n");
    let errors = refused(&main);
    for line in
        ["staff.cidr`, line 2, column 3: `office` is not", "line 4, column 1: `10.0.0.1/8` has"]
    {
        assert!(errors.contains(line), "{errors}");
    }
    write(directory.path(), "staff.cidr", "x\n".repeat(1000));
    let errors = refused(&main);
    assert!(errors.contains("900 more lines are no networks: 101, 102"), "{errors}");
}

#[test]
fn what_is_wrong_with_a_file_is_said_with_its_name() {
    let directory = tempfile::tempdir().expect("a directory");
    let at = |name: &str| directory.path().join(name);
    let missing = refused(&at("missing.toml"));
    assert!(missing.contains("missing.toml`: there is no such file"), "{missing}");
    assert!(missing.ends_with("\n1 error\n"), "{missing}");

    let dir = refused(directory.path());
    assert!(dir.contains("`: it is a directory"), "{dir}");

    // A file whose reads fail, whoever reads.
    let unreadable = refused(Path::new("/proc/self/mem"));
    assert!(unreadable.contains("can't read `/proc/self/mem`"), "{unreadable}");

    let below_a_file = refused(Path::new("/dev/null/agent.toml"));
    assert!(below_a_file.contains("can't read"), "{below_a_file}");
    assert!(below_a_file.ends_with("\n1 error\n"), "{below_a_file}");

    let large = write(directory.path(), "large.toml", "#".repeat(10 << 20));
    let large = refused(&large);
    assert!(large.contains("larger than 4 MiB"), "{large}");

    let main = write(directory.path(), MAIN, AGENT);
    fs::create_dir_all(at("conf.d/a.toml")).expect("directory");
    let drop_in = refused(&main);
    assert!(drop_in.contains("a.toml`: it is a directory"), "{drop_in}");

    fs::remove_dir_all(at("conf.d")).expect("removed");
    std::os::unix::fs::symlink(at("nowhere"), at("link")).expect("linked");
    fs::create_dir(at("conf.d")).expect("directory");
    std::os::unix::fs::symlink(at("nowhere"), at("conf.d/b.toml")).expect("linked");
    let dangling = refused(&main);
    assert!(dangling.contains("b.toml`: there is no such file"), "{dangling}");

    fs::remove_dir_all(at("conf.d")).expect("removed");
    fs::write(at("conf.d"), "").expect("written");
    let not_a_directory = refused(&main);
    assert!(not_a_directory.contains("conf.d`: "), "{not_a_directory}");
}

#[test]
fn encodings_other_than_utf_8_are_named_with_their_place() {
    let errors =
        |bytes: &[u8]| load_bytes(&[(Path::new(MAIN), bytes)], &Host).expect_err("it is bad");
    let bad = errors(b"[agent]\ninterfaces = [\"\xe9th0\"]\n");
    assert_eq!(bad.len(), 1, "{bad:?}");
    assert_eq!((bad[0].place.line, bad[0].place.column), (2, 16));
    assert!(bad[0].message.contains("byte 0xe9 at offset 23"), "{bad:?}");

    let utf_16: Vec<u8> = "\u{feff}[agent]\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let bad = errors(&utf_16);
    assert!(bad[0].help.as_deref().is_some_and(|h| h.contains("UTF-16")), "{bad:?}");

    let with_bom = format!("\u{feff}{AGENT}{SERVICE}");
    assert_eq!(good(&with_bom).config, good(&format!("{AGENT}{SERVICE}")).config);
    let bad = errors("\u{feff}x = 1\n".as_bytes());
    assert_eq!((bad[0].place.line, bad[0].place.column), (1, 1));
}

#[test]
fn depth_and_size_are_bounded() {
    for text in [
        "[".repeat(100_000),
        format!("a = {}", "[".repeat(100_000)),
        format!("a = {}", "{b=".repeat(100_000)),
        format!("{}a = 1", "a.".repeat(1_000_000)),
        format!("[{}a]", "a.".repeat(1_000_000)),
        "=".repeat(4 << 20),
        "x=\n".repeat(50_000),
        "\"".repeat(1 << 20),
        (0..100_000).fold(String::new(), |mut text, i| {
            let _ = writeln!(text, "key{i} = 1");
            text
        }),
    ] {
        let errors = load_str(MAIN, &text).expect_err("it is bad");
        assert!(errors.len() <= 1002, "{} errors", errors.len());
        check_places(&[(Path::new(MAIN), text.as_bytes())], &errors);
    }
}

#[test]
fn addresses_times_ports_without_measure_do_not_stall() {
    let vips: Vec<String> =
        (0..65_000_u32).map(|i| format!("\"10.{}.{}.1\"", i >> 8, i & 0xff)).collect();
    let ports: Vec<String> = (1..=65_000).map(|p| format!("\"tcp/{p}\"")).collect();
    let text = format!(
        "{AGENT}[[service]]\nname = \"a\"\nvip = [{}]\nports = [{}]\n\
         versions.stable.backends = \"192.0.2.1:80\"\n",
        vips.join(","),
        ports.join(",")
    );
    let errors = load_str(MAIN, &text).expect_err("it is bad");
    assert!(errors[0].message.contains("need 4225000000 IPv4 addresses"), "{errors:?}");
    assert!(errors[0].help.as_deref().is_some_and(|h| h.contains("65536 at most")));
}

#[test]
fn the_largest_configuration_is_read() {
    let mut text = String::from(
        "[agent]\ninterfaces = [\"eth0\"]\n[agent.capacity]\nservices = 4096\nvips = 4096\n\
         backends = 16384\nbuckets = 16777216\nflows = 4000000\n",
    );
    for i in 0..4096_u32 {
        let (high, low) = (i >> 8, i & 0xff);
        let _ = writeln!(
            text,
            "[[service]]\nname = \"s{i}\"\nvip = \"192.0.2.1\"\nports = \"tcp/{}\"\nbuckets = 4096\n\
             versions.stable.backends = [\"10.1.{high}.{low}:1\", \"10.2.{high}.{low}:1\"]\n\
             versions.v2.backends = [\"10.3.{high}.{low}:1\", \"10.4.{high}.{low}:1\"]",
            i + 1
        );
    }
    let loaded = good(&text);
    assert_eq!(loaded.warnings, []);
    assert_eq!(loaded.config.services.len(), 4096);
}
