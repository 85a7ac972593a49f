"""DICOM series that the tests make: what is odd is put in afterwards, field by field."""

import copy

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

NAME = "Avasarala^Chrisjen"
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def make_slices(array, affine, name=NAME, **fields):
    """Return one CT image for each slice of stored values (I, J, K), whose affine is RAS+ mm."""
    world = LPS @ affine
    lengths = np.linalg.norm(world[:3, :3], axis=0)
    study, series, frame_of_reference = (generate_uid() for _ in range(3))
    slices = []
    for k in range(array.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
        image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        image.StudyInstanceUID, image.SeriesInstanceUID = study, series
        image.FrameOfReferenceUID = frame_of_reference
        image.PatientName, image.PatientID = name, "PGBM-002"
        image.PatientBirthDate, image.PatientSex = "19700101", "F"
        image.ReferringPhysicianName = "Holden^James"
        image.StudyDate, image.StudyTime, image.StudyID = "20260102", "101112", "7"
        image.AccessionNumber, image.Modality, image.SeriesNumber = "", "CT", 3
        image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        image.SeriesDescription = "thorax of Avasarala"
        image.InstanceNumber = k + 1
        image.ImagePositionPatient = [f"{x:.8g}" for x in (world @ [0, 0, k, 1])[:3]]
        turned = (world[:3, :2] / lengths[:2]).T.ravel()
        image.ImageOrientationPatient = [f"{x:.8g}" for x in turned]
        image.PixelSpacing = [f"{lengths[1]:.8g}", f"{lengths[0]:.8g}"]
        image.SliceThickness = f"{lengths[2]:.8g}"
        image.Rows, image.Columns = array.shape[1], array.shape[0]
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
        image.PixelRepresentation = 1
        image.RescaleSlope, image.RescaleIntercept, image.RescaleType = "1", "-1000", "HU"
        image.PixelData = np.ascontiguousarray(array[:, :, k].T, dtype="<i2").tobytes()
        for field, value in fields.items():
            setattr(image, field, value)
        slices.append(image)
    return slices


def save(folder, slices, order=None):
    """Write slices as 1.dcm, 2.dcm ... in an order of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, index in enumerate(order or range(len(slices)), 1):
        slices[index].save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return folder


def join_frames(slices):
    """Return the slices as one enhanced multi-frame image, with a rescale of its own for each."""
    image = copy.deepcopy(slices[0])
    meta = image.file_meta
    image.SOPClassUID = meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    image.NumberOfFrames = len(slices)
    image.PixelData = b"".join(one.PixelData for one in slices)
    shared, frames = pydicom.Dataset(), []
    shared.PlaneOrientationSequence = _take(slices[0], "ImageOrientationPatient")
    shared.PixelMeasuresSequence = _take(slices[0], "PixelSpacing", "SliceThickness")
    for one in slices:
        frame = pydicom.Dataset()
        frame.PlanePositionSequence = _take(one, "ImagePositionPatient")
        frame.PixelValueTransformationSequence = _take(
            one, "RescaleSlope", "RescaleIntercept", "RescaleType"
        )
        frames.append(frame)
    image.SharedFunctionalGroupsSequence = Sequence([shared])
    image.PerFrameFunctionalGroupsSequence = Sequence(frames)
    for field in (
        *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
        *("RescaleSlope", "RescaleIntercept", "RescaleType"),
    ):
        delattr(image, field)
    return image


def _take(item, *fields):
    """Return a sequence of one item that holds some fields of another."""
    taken = pydicom.Dataset()
    for field in fields:
        setattr(taken, field, getattr(item, field))
    return Sequence([taken])
