//! A folder of one agent: configuration, socket, state, and a bpffs of its own.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::netns::unique_name;

/// A temporary folder with a bpffs mounted in it, both gone on drop.
#[derive(Debug)]
pub struct Workdir {
    path: PathBuf,
}

impl Workdir {
    /// Makes the folder and mounts the bpffs.
    ///
    /// # Panics
    /// Not root, or the kernel has no bpffs.
    #[track_caller]
    pub fn new(role: &str) -> Self {
        let path = std::env::temp_dir().join(unique_name(role));
        let workdir = Self { path };
        let bpffs = workdir.bpffs();
        fs::create_dir_all(&bpffs).unwrap_or_else(|error| panic!("{}: {error}", bpffs.display()));
        mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), None::<&str>)
            .unwrap_or_else(|error| panic!("mount -t bpf at {}: {error}", bpffs.display()));
        workdir
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the bpffs is mounted.
    pub fn bpffs(&self) -> PathBuf {
        self.path.join("bpffs")
    }
}

impl Drop for Workdir {
    fn drop(&mut self) {
        // Pins go with the mount, and programs with their pins. A state may have a file system of
        // its own. The folder is emptied only when nothing is mounted in it any more.
        let _ = umount2(&self.path.join("state"), MntFlags::MNT_DETACH);
        if umount2(&self.bpffs(), MntFlags::MNT_DETACH).is_ok() || !self.bpffs().exists() {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}
