//! Who runs from files of this host.
//!
//! Owns: the question before files are removed or copied. Never: says "nobody" where a libvirt cannot be asked.
//! A crash here costs one answer.

use std::path::{Path, PathBuf};

use shared::error::Code;
use shared::vault;

use super::{beneath, disks_of, told, uuid_of};
use crate::sources::Error;
use crate::sources::libvirt::virsh::{Sizes, Uri};
use crate::{Agent, hypervisors};

/// Name of the domain that a job has made at the libvirt of a URI, where it stands there and has the job's files as its disks.
///
/// # Errors
/// Where that libvirt cannot be asked: then nobody knows.
pub fn runs_from(job: &str, uri: &str) -> Result<Option<String>, Error> {
    let unknown = |why: String| {
        let message = format!("whether a VM has the files of {job} as its disks cannot be seen at {uri}: {why}");
        Error { code: Code::BadGateway, message, retryable: true }
    };
    let (libvirt, uuid) = (Uri::parse(uri).map_err(&unknown)?, uuid_of(job));
    if !libvirt.domains().map_err(|e| unknown(e.to_string()))?.contains(&uuid) {
        return Ok(None);
    }
    // Disks that were copied into a pool need no other files.
    let disks = libvirt.ask(&["dumpxml", "--inactive", &uuid]).map(|xml| disks_of(&xml)).unwrap_or_default();
    let is_its = |(path, _): &(PathBuf, &str)| path.components().any(|part| part.as_os_str() == job);
    if !disks.is_empty() && !disks.iter().any(is_its) {
        return Ok(None);
    }
    let name = libvirt.ask(&["domname", &uuid]).map(|said| said.trim().to_owned()).unwrap_or_default();
    Ok(Some(if name.is_empty() { uuid } else { name }))
}

/// The domain that has a file below this folder as its disk or beneath it, and its connection; of the libvirts that this agent serves here.
///
/// # Errors
/// Where one of them cannot be asked: then nobody knows.
pub fn user_of(agent: &Agent, folder: &Path) -> Result<Option<(String, String)>, Error> {
    for connection in agent.serves(hypervisors::LIBVIRT) {
        let Some(uri) = Uri::parse(&connection.path).ok().filter(|uri| uri.is_here) else { continue };
        let unknown = |e: Error| {
            let message = format!("whether a VM of `{}` uses these files cannot be seen: {}", connection.name, e.message);
            Error { code: Code::BadGateway, message, retryable: true }
        };
        let domains = uri.domains().map_err(told).map_err(unknown)?;
        for (xml, _) in uri.describe(&domains, Sizes::Known).map_err(told).map_err(unknown)? {
            if uses(agent, &xml, folder) {
                let name = roxmltree::Document::parse(&xml).ok();
                let name =
                    name.as_ref().and_then(|document| document.root_element().children().find(|node| node.has_tag_name("name"))?.text());
                return Ok(Some((name.unwrap_or_default().to_owned(), connection.name.clone())));
            }
        }
    }
    Ok(None)
}

/// Whether a domain's disks, or what lies beneath them, are in the folder. Libvirt knows the layers of a domain that runs, the images' headers
/// those of the others.
fn uses(agent: &Agent, xml: &str, folder: &Path) -> bool {
    // Its disks may be called by a way through links.
    let is_in = |path: &Path| path.starts_with(folder) || vault::real_user_path(path).is_ok_and(|real| real.starts_with(folder));
    let named = |(path, format): (PathBuf, &str)| {
        let disk = shared::vm::Disk { source: path.display().to_string(), format: format.to_owned(), ..shared::vm::Disk::default() };
        is_in(&path) || beneath::layers(&agent.vault, &disk).iter().any(|path| is_in(path))
    };
    files_of(xml).iter().any(|path| is_in(path)) || disks_of(xml).into_iter().any(named)
}

/// Every file that a description names as a source.
fn files_of(xml: &str) -> Vec<PathBuf> {
    let Ok(document) = roxmltree::Document::parse(xml) else { return Vec::new() };
    let sources = document.descendants().filter(|node| node.has_tag_name("source"));
    sources.filter_map(|node| node.attribute("file")).map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_that_libvirt_knows_are_files_of_the_domain() {
        let xml = "<domain><devices><disk type='file'><source file='/a/top.qcow2'/><backingStore type='file'><format type='qcow2'/>\
                   <source file='/b/base.qcow2'/><backingStore/></backingStore></disk></devices></domain>";
        assert_eq!(files_of(xml), [PathBuf::from("/a/top.qcow2"), PathBuf::from("/b/base.qcow2")]);
    }
}
