//! `canary-agent replay`, as a process.

use std::{
    fs,
    io::{Read, Write},
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::exact;

const GATES: &str = r#"
[[gate]]
name         = "one"
min_duration = "3s"
signals      = [{ name = "connect_failed", tolerate = 1.2, pass_below = 3.0 }]

[[gate]]
name         = "two"
min_duration = "0s"
deadline     = "10s"
signals = [
  { name = "connect_failed" },
  { name = "server_reset", observe = true },
  { prometheus = "http://127.0.0.1:9090", query = "up", above = 0.5 },
]

[[gate]]
name    = "asks"
signals = [{ prometheus = "http://127.0.0.1:9090", query = "up", above = 0.5 }]

# What is not about gates may be half edited.
[[service]]
nmae = "shop"
"#;

struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("agent.toml"), GATES).expect("written");
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, file: &str, rest: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_canary-agent"));
        command
            .arg("--config")
            .arg(self.path("agent.toml"))
            .args(["replay", file])
            .args(rest)
            .current_dir(self.dir.path())
            .env_remove("CANARY_CONFIG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn replay(&self, text: impl AsRef<[u8]>, rest: &[&str]) -> Output {
        fs::write(self.path("r.csv"), text).expect("written");
        self.command("r.csv", rest).output().expect("started")
    }

    fn json(&self, rows: &str, gate: &str) -> Vec<Value> {
        let text = format!("window,signal,share,control,canary\n{rows}");
        let output = self.replay(text, &["--gate", gate, "--json"]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
        serde_json::from_slice(&output.stdout).expect("a list")
    }

    /// Fails, and gives what is said.
    fn refusal(&self, text: impl AsRef<[u8]>) -> String {
        let output = self.replay(text, &["--gate", "two"]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).expect("text")
    }
}

fn verdicts(items: &[Value]) -> Vec<&str> {
    items.iter().map(|item| item["verdict"].as_str().expect("a word")).collect()
}

#[test]
fn each_line_has_both_logarithms_and_the_verdict_so_far() {
    let place = Place::new();
    let rows = [(0.05, 3, 1), (0.05, 4, 0), (0.1, 2, 2), (0.1, 5, 9), (0.1, 50, 0)];
    let mut text = String::new();
    for (second, (share, control, canary)) in rows.iter().enumerate() {
        text.push_str(&format!("{second},connect_failed,{share},{control},{canary}\n"));
    }
    let items = place.json(&text, "one");
    assert_eq!(verdicts(&items), ["undecided", "undecided", "undecided", "fail", "fail"]);
    for (index, item) in items.iter().enumerate() {
        let keys: Vec<&str> =
            item.as_object().expect("an object").keys().map(String::as_str).collect();
        assert_eq!(keys.len(), 5, "{keys:?}");
        assert_eq!(item["window"], index as u64);
        assert_eq!(item["signal"], "connect_failed");
        let seen = &rows[..=index];
        for (key, null, multiples) in
            [("ln_fail", 1.2, exact::worse()), ("ln_pass", 3.0, exact::better())]
        {
            let expected = exact::ln(&exact::statistic(&exact::of(null), &multiples, seen));
            let shown = item[key].as_f64().expect("a number");
            assert!((shown - expected).abs() < 1e-12, "{key} {index}: {shown} {expected}");
        }
    }
}

#[test]
fn connections_of_control_may_stand_at_the_end() {
    let place = Place::new();
    let replayed = |header: &str, row: &str| {
        let rows: String =
            (1..=9).map(|second| format!("{second},connect_failed,{row}\n")).collect();
        place.replay(
            format!("window,signal,share,control,canary{header}\n{rows}"),
            &["--gate", "one"],
        )
    };
    let end = |output: Output| {
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let shown = String::from_utf8(output.stdout).expect("text");
        shown.lines().any(|line| line.ends_with(" pass"))
    };
    assert!(end(replayed("", "0.5,60,60")));
    assert!(end(replayed(",connections", "0.5,60,60,")), "not known");
    assert!(end(replayed(",connections", "0.5,60,60,181")));
    assert!(
        !end(replayed(",connections", "0.5,60,60,180")),
        "a canary can't be three times as bad"
    );
    for (header, row, error) in [
        ("", "0.5,60,60,180", "line 2: it has 6 fields, not 5"),
        (",connections", "0.5,60,60", "line 2: it has 5 fields, not 6"),
        (",connections", "0.5,60,60,-1", "line 2: connections `-1` is not a number"),
        (",conections", "0.5,60,60,1", "line 1: the header is"),
    ] {
        let output = replayed(header, row);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let shown = String::from_utf8(output.stderr).expect("text");
        assert!(shown.contains(error), "{shown}");
    }
}

#[test]
fn it_passes_from_the_shortest_time_on() {
    let place = Place::new();
    let rows: String =
        (1..=4).map(|second| format!("{second},connect_failed,0.5,60,5\n")).collect();
    let pass = ["undecided", "undecided", "pass", "pass"];
    assert_eq!(verdicts(&place.json(&rows, "one")), pass);
    // From any second on, and with parts of seconds.
    let rows: String =
        (1..=4).map(|n| format!("17672256{n:02}.5,connect_failed,0.5,60,5\n")).collect();
    let items = place.json(&rows, "one");
    assert_eq!(verdicts(&items), pass);
    assert_eq!(items[0]["window"], 1_767_225_601.5);
    // Windows that are counted, each ten seconds long.
    let rows = "1,connect_failed,0.5,60,5\n2,connect_failed,0.5,60,5\n";
    let text = format!("window,signal,share,control,canary\n{rows}");
    let output = place.replay(&text, &["--gate", "one", "--every", "10s", "--json"]);
    let items: Vec<Value> = serde_json::from_slice(&output.stdout).expect("a list");
    assert_eq!(verdicts(&items)[0], "pass");
    let bad = place.replay(&text, &["--gate", "one", "--every", "0s"]);
    assert_eq!(bad.status.code(), Some(2), "{bad:?}");
}

#[test]
fn people_see_thresholds_lines_and_how_it_ended() {
    let place = Place::new();
    let text = "window,signal,share,control,canary\n\
                7,connect_failed,0.05,3,1\n7,server_reset,0.05,900,0\n\
                8,connect_failed,0.05,2,9\n";
    let output = place.replay(text, &["--gate", "two"]);
    let shown = String::from_utf8(output.stdout).expect("text");
    assert_eq!(output.status.code(), Some(0), "{shown}");
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(
        lines[..8],
        [
            "gate two",
            "  fails when ln_fail of a deciding signal reaches 4.605 (alpha 0.01 over 1 signal)",
            "  passes when ln_pass of each reaches 2.996 (beta 0.05), from 0s on",
            "  is inconclusive after 10s",
            "  connect_failed: tolerate 1.2, pass_below 3",
            "  server_reset: tolerate 1.2, pass_below 3, only observed",
            "  1 query of Prometheus is not replayed",
            "",
        ]
    );
    assert!(lines[8].starts_with("      WINDOW  SIGNAL "), "{shown}");
    assert!(lines[9].starts_with("           7  connect_failed         5%          3          1 "));
    assert!(lines[9].ends_with("  undecided") && lines[11].ends_with("  fail"), "{shown}");
    assert!(lines[10].contains("  server_reset "), "{shown}");
    assert!(
        lines[13].starts_with("fails in window 8, after 2s: ln_fail of connect_failed is 15.")
            && lines[13].ends_with(
                ", of 4.605 that it takes, with 5 bad events on control and 10 on the canary"
            ),
        "{shown}"
    );
    let ends = |rows: &str| {
        let text = format!("window,signal,share,control,canary\n{rows}");
        let output = place.replay(text, &["--gate", "two"]);
        let shown = String::from_utf8(output.stdout).expect("text");
        shown.lines().last().expect("a line").to_owned()
    };
    assert_eq!(ends(""), "undecided after 0 windows, 0s");
    assert_eq!(ends("1,connect_failed,0.05,0,0\n"), "undecided after 1 window, 1s");
    assert_eq!(
        ends("1,connect_failed,0.05,0,0\n12,connect_failed,0.05,0,0\n"),
        "no data at the deadline, in window 12, after 12s: connect_failed had no event on \
         either side"
    );
    let inconclusive = ends("1,connect_failed,0.05,1,0\n12,connect_failed,0.05,0,0\n");
    assert!(
        inconclusive.starts_with("inconclusive at the deadline, in window 12, after 12s: ln_pass")
    );
    assert_eq!(ends("1,connect_failed,0.5,60,5\n"), "passes in window 1, after 1s");
    // Nothing at all is a list, too.
    assert_eq!(place.json("", "two"), Vec::<Value>::new());
}

#[test]
fn every_line_that_is_wrong_is_named() {
    let place = Place::new();
    let shown = place.refusal(
        "window,signal,share,control,canary\n\
         1,connect_failed,5%,1,1\n\
         1,conect_failed,0.1,1,1\n\
         1,slow_handshake,0.1,1,1\n\
         1,connect_failed,1.01,1,1\n\
         1,connect_failed,nan,1,1\n\
         1,connect_failed,-0.1,1,1\n\
         \n\
         1,connect_failed,0.1,-1,1\n\
         1,connect_failed,0.1,1,1.0\n\
         1,connect_failed,0.1,1,18446744073709551616\n\
         1,connect_failed,0.1,1\n\
         -1,connect_failed,0.1,1,1\n\
         soon,connect_failed,0.1,1,1\n\
         5,connect_failed,0.1,1,1\n\
         4,connect_failed,0.1,1,1\n\
         5,connect_failed,0.1,1,1\n",
    );
    let said: Vec<&str> = shown.lines().filter_map(|line| line.strip_prefix("error: ")).collect();
    assert_eq!(
        said,
        [
            "line 2: share `5%` is not from 0 to 1",
            "line 3: `conect_failed` is no signal of this gate",
            "line 4: `slow_handshake` is no signal of this gate",
            "line 5: share `1.01` is not from 0 to 1",
            "line 6: share `nan` is not from 0 to 1",
            "line 7: share `-0.1` is not from 0 to 1",
            "line 9: control `-1` is not a number",
            "line 10: canary `1.0` is not a number",
            "line 11: canary `18446744073709551616` is not a number",
            "line 12: it has 4 fields, not 5",
            "line 13: `-1` is not a window",
            "line 14: `soon` is not a window",
            "line 16: window 4 comes after window 5",
            "line 17: `connect_failed` stands twice in this window; first in line 15",
        ],
        "{shown}"
    );
    for (text, error) in [
        (&b""[..], "line 1: the file is empty"),
        (b"\n\n", "line 1: the file is empty"),
        (
            b"window,signal,share,canary,control\n",
            "line 1: the header is `window,signal,share,canary,control`",
        ),
        (b"1,connect_failed,0.1,1,1\n", "line 1: the header is `1,connect_failed,0.1,1,1`"),
        (b"\xff\xfew\0i\0n\0", "line 1: the header is"),
        (
            b"window,signal,share,control,canary\n1,connect\xff,0.1,1,1\n",
            "line 2: `signal` is not UTF-8",
        ),
    ] {
        let shown = place.refusal(text);
        assert!(shown.starts_with(&format!("error: {error}")), "{shown}");
    }
    // A line without an end is not held in memory.
    let mut endless = b"window,signal,share,control,canary\n".to_vec();
    endless.resize(1 << 20, b'1');
    assert!(place.refusal(&endless).starts_with("error: line 2: it is longer than 4096 bytes"));
    // Nor are complaints without end.
    let many = format!("window,signal,share,control,canary\n{}", "x\n".repeat(100_000));
    let shown = place.refusal(many);
    assert!(shown.contains("line 102: what follows was not read"), "{shown}");
    assert!(shown.len() < 100_000);
}

#[test]
fn errors_are_json_and_say_what_to_do() {
    let place = Place::new();
    let text = "window,signal,share,control,canary\n1,connect_failed,0.1,1,1\n2,x,0.1,1,1\n";
    let output = place.replay(text, &["--gate", "two", "--json"]);
    let body: Value = serde_json::from_slice(&output.stdout).expect("JSON alone");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(body["error"]["code"], "bad_recording");
    assert_eq!(body["error"]["diagnostics"][0]["line"], 3);

    let unknown = place.replay(text, &["--gate", "three"]);
    assert_eq!(unknown.status.code(), Some(1));
    let shown = String::from_utf8(unknown.stderr).expect("text");
    assert!(shown.contains("there is no gate `three`") && shown.contains("it has `one`, `two`"));
    let queries = place.replay(text, &["--gate", "asks"]);
    let shown = String::from_utf8(queries.stderr).expect("text");
    assert!(shown.contains("gate `asks` has no signal that is counted"), "{shown}");
    let missing = place.command("nothing.csv", &["--gate", "two"]).output().expect("started");
    assert_eq!(missing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("can't read nothing.csv"));
    let usage = place.command("r.csv", &[]).output().expect("started");
    assert_eq!(usage.status.code(), Some(2));

    fs::write(place.path("agent.toml"), "[[gate]]\nname = \"two\"\nalpha = 2\n").expect("written");
    let bad = place.replay(text, &["--gate", "two"]);
    assert_eq!(bad.status.code(), Some(78));
    let shown = String::from_utf8(bad.stderr).expect("text");
    assert!(shown.contains("`alpha` must be from") && shown.contains("agent.toml:3:9"), "{shown}");
}

#[test]
fn other_programs_ways_to_write_csv_are_read() {
    let place = Place::new();
    let text = "\u{feff}\"window\",\"signal\",\"share\",\"control\",\"canary\"\r\n\
                1.0, connect_failed ,5e-2,3,1\r\n\
                \"2\",\"connect_failed\",\"0.05\",\"2\",\"0\"";
    let output = place.replay(text, &["--gate", "two", "--json"]);
    let items: Vec<Value> = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {output:?}"));
    assert_eq!(items.len(), 2);
    assert_eq!((&items[0]["window"], &items[1]["window"]), (&1.into(), &2.into()));
}

/// What is read is shown before the file has ended: nothing waits for the rest.
#[test]
fn a_recording_is_read_as_a_stream() {
    let place = Place::new();
    let mut child =
        place.command("-", &["--gate", "one"]).stdin(Stdio::piped()).spawn().expect("started");
    let mut input = child.stdin.take().expect("a pipe");
    let mut output = child.stdout.take().expect("a pipe");
    input.write_all(b"window,signal,share,control,canary\n").expect("written");
    let mut rows = String::new();
    for second in 0..20_000 {
        rows.push_str(&format!("{second},connect_failed,0.05,1,0\n"));
    }
    let writer = std::thread::spawn(move || {
        input.write_all(rows.as_bytes()).expect("written");
        input
    });
    // The input is still open.
    let mut begun = vec![0; 100_000];
    output.read_exact(&mut begun).expect("lines");
    assert!(String::from_utf8_lossy(&begun).contains("          50  connect_failed"));
    let reader = std::thread::spawn(move || {
        let mut rest = String::new();
        output.read_to_string(&mut rest).map(|_| rest)
    });
    drop(writer.join().expect("written"));
    let rest = reader.join().expect("read").expect("text");
    assert!(
        rest.trim_end().lines().last().expect("lines").starts_with("passes in window "),
        "{rest}"
    );
    assert_eq!(child.wait().expect("ended").code(), Some(0));
}
