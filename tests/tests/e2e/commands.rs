//! Commands of the real program that need no daemon.

use canary_tests::{
    agent::{Agent, AgentOptions},
    host,
};

use crate::support::{Bench, Way, finish};

#[test]
fn check_completions_and_man_run_from_the_real_program() {
    if !host::ready("check_completions_and_man_run_from_the_real_program") {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 1), ("v2", 1)]);
    let options = AgentOptions::native(&bench.topology);
    let agent = Agent::prepare(&bench.topology.balancer, &options, &bench.services(""));
    let run = |args: &[&str]| {
        let output = finish(agent.command(args));
        assert_eq!(output.code, 0, "{args:?}: {output:?}");
        assert_eq!(output.stderr, "", "{args:?}");
        output.stdout
    };
    run(&["check"]);
    let findings: Vec<serde_json::Value> =
        serde_json::from_str(&run(&["check", "--json"])).expect("a list");
    assert_eq!(findings.len(), 0, "{findings:?}");
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = run(&["completions", shell]);
        assert!(script.contains("canary-agent") && script.contains("split"), "{shell}: {script}");
    }
    let page = run(&["man"]);
    assert!(page.contains(".TH canary-agent"), "{page}");
    let folder = agent.folder().join("man");
    std::fs::create_dir(&folder).expect("a folder");
    run(&["man", "--dir", folder.to_str().expect("a path")]);
    let pages = std::fs::read_dir(&folder).expect("pages").count();
    assert!(pages >= 8, "{pages} pages");
    assert!(run(&["--version"]).contains("canary-agent"));
    for command in ["run", "check", "status", "split", "explain", "detach", "completions", "man"] {
        assert!(run(&[command, "--help"]).contains("Usage"), "{command}");
    }
}
