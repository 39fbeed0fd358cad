//! Modules of a kernel, and the order that they are loaded in.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::setup::probe;

/// What tests use of a kernel. What it has built in has no file, and needs none.
const WANTED: [&str; 14] = [
    "virtio_pci",
    "virtio_net",
    "veth",
    "bridge",
    "8021q",
    "dummy",
    "ipip",
    "sit",
    "ip6_tunnel",
    "fou",
    "fou6",
    "sch_netem",
    "sch_ingress",
    "ipv6",
];

/// A module, ready for the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) image: Vec<u8>,
}

/// The modules in a folder that tests use, each after those that it needs.
///
/// # Errors
/// One of them can't be read, or needs another that is not there.
pub(crate) fn wanted(folder: &Path) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    find(folder, &mut files).with_context(|| format!("reading {}", folder.display()))?;
    let mut loaded = Vec::new();
    for name in WANTED {
        if files.contains_key(name) {
            add(name, &files, &mut loaded)?;
        }
    }
    Ok(loaded)
}

/// Files of modules by name, in which the kernel takes `-` for `_`.
fn find(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find(&entry.path(), files)?;
            continue;
        }
        let name = entry.file_name().to_string_lossy().replace('-', "_");
        if let Some((name, "" | ".xz" | ".zst" | ".gz")) = name.split_once(".ko") {
            files.insert(name.to_owned(), entry.path());
        }
    }
    Ok(())
}

fn add(name: &str, files: &BTreeMap<String, PathBuf>, loaded: &mut Vec<Module>) -> Result<()> {
    if loaded.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let path = files.get(name).with_context(|| format!("there is no module {name}"))?;
    let image = read(path)?;
    for needed in needs(&image) {
        add(&needed, files, loaded).with_context(|| format!("{name} needs {needed}"))?;
    }
    loaded.push(Module { name: name.to_owned(), image });
    Ok(())
}

/// A module's file, unpacked.
fn read(path: &Path) -> Result<Vec<u8>> {
    let packer = match path.extension().and_then(|ending| ending.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).with_context(|| format!("reading {}", path.display())),
    };
    let program = probe::find(packer)
        .with_context(|| format!("{} can't be unpacked: {packer} is missing", path.display()))?;
    let output = std::process::Command::new(program)
        .args(["--decompress", "--stdout"])
        .arg(path)
        .stdin(std::process::Stdio::null())
        .output()
        .with_context(|| format!("running {packer}"))?;
    if !output.status.success() {
        bail!("{packer} can't unpack {}", path.display());
    }
    Ok(output.stdout)
}

/// The names in `depends=` of its section `.modinfo`, whose texts end with NUL.
fn needs(image: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = image.windows(key.len()).position(|window| window == key) else {
        return Vec::new();
    };
    let value = image[at + key.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needs_come_from_the_modules_own_information() {
        let needs_of = |text: &str| needs(text.as_bytes());
        assert_eq!(
            needs_of("\0license=GPL\0depends=tunnel4,ip-tunnel\0x=1\0"),
            ["tunnel4", "ip_tunnel"]
        );
        assert!(needs_of("\0depends=\0retpoline=Y\0").is_empty());
        assert!(needs_of("no module").is_empty());
    }
}
