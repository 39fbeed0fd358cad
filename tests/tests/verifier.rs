//! What the programs cost the kernel's verifier: all of it loads on the running
//! kernel, within `verifier.toml`.

use std::{collections::BTreeMap, fs, path::Path};

use canary_agent::{
    config::model::XdpMode,
    datapath::{Decap, DecapOptions},
};
use canary_tests::{
    host,
    loaded::Loaded,
    workdir::Workdir,
    world::{Service, World},
};
use nix::sys::utsname::uname;
use serde::Deserialize;

/// `tests/verifier.toml`.
#[derive(Deserialize)]
struct Budget {
    /// What no program may exceed, on any kernel.
    limit: u32,
    /// How much a program may have grown, in percent.
    growth: u32,
    /// Program, series of the kernel, instructions.
    program: BTreeMap<String, BTreeMap<String, u32>>,
}

/// `6.1` of `6.1.0-56-cloud-amd64`.
fn series(release: &str) -> String {
    release.split(['.', '-']).take(2).collect::<Vec<_>>().join(".")
}

#[test]
fn every_program_is_within_its_budget() {
    if !host::ready("every_program_is_within_its_budget") {
        return;
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("verifier.toml");
    let text = fs::read_to_string(&path).unwrap();
    let Budget { limit, growth, program } = toml::from_str(&text).unwrap();
    let release = uname().unwrap().release().to_string_lossy().into_owned();

    let world = World { service: vec![Service::default()], ..World::default() };
    let plane = world.plane(|name| anyhow::bail!("no interface {name}")).unwrap().plane;
    let workdir = Workdir::new("verifier");
    let mut decap = unwrapping(&workdir.bpffs().join("decap"));
    let mut infos = Loaded::new(&plane, &world.sizes()).unwrap().datapath.programs().unwrap();
    infos.push(decap.info().unwrap());
    let mut wrong = Vec::new();
    for info in infos {
        let name = info.name_as_str().expect("a name");
        let processed = info.verified_instruction_count().expect("Linux 5.16 or newer tells");
        println!(
            "verifier: Linux {release}: {name}: {processed} instructions processed, {} bytes after",
            info.size_translated().unwrap_or_default()
        );
        if processed > limit {
            wrong.push(format!("{name}: {processed} instructions, more than {limit}"));
        }
        let known = program.get(name).and_then(|known| known.get(&series(&release)));
        let Some(known) = known else {
            if !program.contains_key(name) {
                wrong.push(format!("{name} is not in {}", path.display()));
            }
            continue;
        };
        if u64::from(processed) * 100 > u64::from(*known) * u64::from(100 + growth) {
            wrong.push(format!(
                "{name} has grown from {known} to {processed} instructions on Linux {}: if it must, \
                 say so in {}",
                series(&release),
                path.display()
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The program of `decap`, which is told whom to take packets from.
fn unwrapping(pins: &Path) -> Decap {
    Decap::open(DecapOptions {
        pins: pins.to_owned(),
        addresses: vec!["10.0.0.1".parse().unwrap()],
        senders: vec!["10.0.0.0/8".parse().unwrap()],
        gue_port: 6080,
        xdp_mode: XdpMode::Auto,
        replace: false,
    })
    .unwrap()
}
