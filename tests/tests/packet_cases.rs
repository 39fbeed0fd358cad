//! Packet cases as data: every case of `tests/cases/*.toml`, by name.
//!
//! Takes what libtest takes of a filter: words, of which a case's name must hold
//! one; `--exact`; `--list`. Cases in `self_check.toml` are wrong on purpose
//! and pass by failing.

use std::{
    path::Path,
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use canary_tests::cases::{Stage, Suite};

fn main() -> ExitCode {
    let suite = match Suite::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("cases")) {
        Ok(suite) => suite,
        Err(e) => {
            eprintln!("the cases can't be read: {e:#}");
            return ExitCode::FAILURE;
        }
    };
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let (flags, words): (Vec<_>, Vec<_>) = arguments.iter().partition(|a| a.starts_with("--"));
    let exact = flags.iter().any(|f| *f == "--exact");
    let wanted = |name: &str| {
        words.is_empty() || words.iter().any(|w| if exact { name == *w } else { name.contains(*w) })
    };
    let mut cases: Vec<_> = suite.cases.iter().filter(|(c, _)| wanted(&c.name)).collect();
    cases.sort_by_key(|(case, _)| case.needs_age());
    if flags.iter().any(|f| *f == "--list") {
        for (case, _) in cases {
            println!("{}: test", case.name);
        }
        return ExitCode::SUCCESS;
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("packet cases: not run, loading BPF programs needs root");
        // What can't be run is not proven: a failure where a host is chosen for tests.
        return ExitCode::from(u8::from(std::env::var_os("CI").is_some()));
    }
    let failures = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut stage = Stage::enter().expect("a place to run cases in");
                while let Some((case, world)) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let wrong = stage.run(case, world);
                    let verdict = if wrong.is_empty() { "ok" } else { "FAILED" };
                    println!("test {} ... {verdict}", case.name);
                    if !wrong.is_empty() {
                        let source = case.rfc.as_ref().map(|r| format!(" ({r})"));
                        let all = wrong.join("\n");
                        failures.lock().unwrap_or_else(PoisonError::into_inner).push(format!(
                            "---- {}{} ----\n{all}\n",
                            case.name,
                            source.unwrap_or_default()
                        ));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!();
    for failure in &failures {
        println!("{failure}");
    }
    let (passed, failed) = (cases.len() - failures.len(), failures.len());
    println!("test result: {passed} passed; {failed} failed");
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(101) }
}
