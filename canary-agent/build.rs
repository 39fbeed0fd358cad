//! Builds the crate `canary-ebpf` for the BPF target and hands its objects to the agent.
//!
//! What builds it is described by `target/ebpf-toolchain.json`, which
//! `cargo xtask setup` writes. A packager with finished objects names their
//! folder in `CANARY_EBPF_OBJECT_DIR` instead. The paths of the objects are in the
//! environment variables `CANARY_EBPF_INGRESS` and `CANARY_EBPF_DECAP` of the agent's compilation.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};
use serde::Deserialize;

/// Version of the toolchain file's fields that this script understands.
const FORMAT: u32 = 1;

/// Names of the programs: each is a binary of `canary-ebpf` and a variable `CANARY_EBPF_NAME`.
const PROGRAMS: [&str; 2] = ["ingress", "decap"];

/// The folder with finished objects.
const OBJECT_DIR: &str = "CANARY_EBPF_OBJECT_DIR";

/// `target/ebpf-toolchain.json`.
#[derive(Debug, Deserialize)]
struct Toolchain {
    format: u32,
    rustc_version: String,
    cargo: PathBuf,
    linker: PathBuf,
    env: BTreeMap<String, String>,
    args: Vec<String>,
    rustflags: Vec<String>,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            for line in message.lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed={OBJECT_DIR}");
    let out = PathBuf::from(variable("OUT_DIR")?);
    let finished = env::var_os(OBJECT_DIR).filter(|folder| !folder.is_empty());
    let folder = match &finished {
        Some(folder) => PathBuf::from(folder),
        None => build(&out)?,
    };
    for program in PROGRAMS {
        let from = folder.join(program);
        let to = out.join(program);
        // An object that this script makes is newer than the script's start: to watch it
        // would run the script again at the next build, and make everything after it stale.
        if finished.is_some() {
            println!("cargo::rerun-if-changed={}", from.display());
        }
        let object = fs::read(&from).map_err(|error| format!("{}: {error}", from.display()))?;
        let object =
            without_dwarf(&object).map_err(|error| format!("{}: {error}", from.display()))?;
        write_if_different(&object, &to).map_err(|error| format!("{}: {error}", to.display()))?;
        println!("cargo::rustc-env=CANARY_EBPF_{}={}", program.to_uppercase(), to.display());
    }
    Ok(())
}

/// An object without what debuggers read. The kernel reads BTF, which is made from it, and an
/// agent would have the rest in its memory: it is four fifths of the object.
fn without_dwarf(object: &[u8]) -> Result<Vec<u8>, object::build::Error> {
    let mut object = Builder::read(object)?;
    let is_dwarf = |name: &str| name.trim_start_matches(".rel").starts_with(".debug_");
    for section in &mut object.sections {
        section.delete = is_dwarf(&String::from_utf8_lossy(&section.name));
    }
    object.delete_orphans();
    // LLVM keeps names of sections and of symbols in one table, which can't be written so.
    let of_sections = |data: &SectionData<'_>| matches!(data, SectionData::SectionString);
    if !object.sections.iter().any(|section| of_sections(&section.data)) {
        let names = object.sections.add();
        names.name = ".shstrtab".into();
        names.sh_type = SHT_STRTAB;
        names.sh_addralign = 1;
        names.data = SectionData::SectionString;
    }
    let mut stripped = Vec::new();
    object.write(&mut stripped)?;
    Ok(stripped)
}

/// Writes a file, and leaves one that is the same already as it is, time and all.
fn write_if_different(object: &[u8], to: &Path) -> std::io::Result<()> {
    if fs::read(to).is_ok_and(|present| present == object) {
        return Ok(());
    }
    fs::write(to, object)
}

/// Builds the programs and returns the folder that holds them.
fn build(out: &Path) -> Result<PathBuf, String> {
    let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let workspace = manifest.parent().ok_or("the crate has no parent folder")?;
    for source in [
        "Cargo.lock",
        "Cargo.toml",
        "canary-ebpf/Cargo.toml",
        "canary-ebpf/src",
        "canary-ebpf-common/Cargo.toml",
        "canary-ebpf-common/src",
    ] {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }
    let description = workspace.join("target").join("ebpf-toolchain.json");
    println!("cargo::rerun-if-changed={}", description.display());
    let toolchain = toolchain(&description)?;

    let target = out.join("ebpf");
    let mut command = Command::new(&toolchain.cargo);
    clean_env(&mut command);
    let output = command
        .current_dir(workspace)
        .envs(&toolchain.env)
        .env("CARGO_ENCODED_RUSTFLAGS", flags(&toolchain, workspace)?.join("\x1f"))
        // A wrapper of the user's knows this workspace's compiler, not this one.
        .env("RUSTC_WRAPPER", "")
        .env("CARGO_TERM_COLOR", "never")
        .args(["build", "--quiet"])
        .args(&toolchain.args)
        // The outer cargo has brought Cargo.lock up to date; another version of
        // cargo must not rewrite it.
        .args(["--locked", "--package", "canary-ebpf", "--bins"])
        .args(["--profile", "ebpf", "--target", "bpfel-unknown-none"])
        // What cargo says of this package's features.
        .args(env::var_os("CARGO_FEATURE_NEXT_ABI").map(|_| "--features=next-abi"))
        .arg("--target-dir")
        .arg(&target)
        .output()
        .map_err(|error| stale(&format!("{}: {error}", toolchain.cargo.display())))?;
    let messages = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!(
            "the programs of canary-ebpf do not build ({}, {}):\n{messages}",
            output.status, toolchain.rustc_version
        ));
    }
    for line in messages.lines().filter(|line| line.starts_with("warning:")) {
        println!("cargo::warning=canary-ebpf: {line}");
    }
    Ok(target.join("bpfel-unknown-none").join("ebpf"))
}

/// Reads the toolchain file and looks whether its tools are still there.
fn toolchain(path: &Path) -> Result<Toolchain, String> {
    let text =
        fs::read_to_string(path).map_err(|error| stale(&format!("{}: {error}", path.display())))?;
    let toolchain: Toolchain = serde_json::from_str(&text)
        .map_err(|error| stale(&format!("{}: {error}", path.display())))?;
    if toolchain.format != FORMAT {
        return Err(stale(&format!(
            "{} has format {}, this checkout reads {FORMAT}",
            path.display(),
            toolchain.format
        )));
    }
    let rustc = toolchain.env.get("RUSTC").map(PathBuf::from);
    for tool in [&toolchain.cargo, &toolchain.linker].into_iter().chain(rustc.as_ref()) {
        if !tool.is_file() {
            return Err(stale(&format!("{} is gone", tool.display())));
        }
        // A replaced compiler or linker builds the object anew.
        println!("cargo::rerun-if-changed={}", tool.display());
    }
    Ok(toolchain)
}

fn stale(reason: &str) -> String {
    format!(
        "the kernel side can't be built yet: {reason}\n\
         run `cargo xtask setup` first: it finds or installs the compiler and the linker for BPF\n\
         (or name a folder with finished objects in {OBJECT_DIR})"
    )
}

/// Compiler flags, the same for every build of the programs on every machine as far as can be.
fn flags(toolchain: &Toolchain, workspace: &Path) -> Result<Vec<String>, String> {
    let host = match variable("CARGO_CFG_TARGET_ARCH")?.as_str() {
        // Names of the kernel's register layouts in aya-ebpf.
        arch @ ("x86_64" | "aarch64") => arch.to_owned(),
        other => {
            return Err(format!("{other} hosts are not supported: x86_64 and aarch64 are"));
        }
    };
    let mut flags = vec![
        format!("--cfg=bpf_target_arch=\"{host}\""),
        // BTF is made from debug information, and only with --btf.
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        format!("-Clinker={}", toolchain.linker.display()),
        // BTF's line information names source files.
        format!("--remap-path-prefix={}=canary-xdp", workspace.display()),
    ];
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cargo")));
    if let Some(home) = cargo_home {
        flags.push(format!("--remap-path-prefix={}=cargo", home.display()));
    }
    flags.extend(toolchain.rustflags.iter().cloned());
    Ok(flags)
}

/// Takes away what the outer cargo and rustup have set for their own compiler;
/// registries, proxies, the job server and `CARGO_HOME` stay.
fn clean_env(command: &mut Command) {
    const KEEP: [&str; 5] =
        ["CARGO_HOME", "CARGO_HTTP_", "CARGO_MAKEFLAGS", "CARGO_NET_", "CARGO_REGISTR"];
    const CARGO_SETS: [&str; 8] = [
        "DEBUG",
        "HOST",
        "LD_LIBRARY_PATH",
        "OPT_LEVEL",
        "PROFILE",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
        "TARGET",
    ];
    for (name, _) in env::vars_os() {
        let Some(name) = name.to_str() else { continue };
        let foreign = name.starts_with("CARGO") && !KEEP.iter().any(|keep| name.starts_with(keep))
            || name.starts_with("RUSTC")
            || name.starts_with("RUSTDOC")
            || CARGO_SETS.contains(&name);
        if foreign {
            command.env_remove(name);
        }
    }
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}
